// A frame with its regions, as the server sees them, ready to be drawn and asked.

const kept = new Map(); // newest last
const MOST = 12;

const address = (what, sequence, frame) =>
  `/api/labels/${what}?sequence=${encodeURIComponent(sequence)}&index=${frame.index}`;

async function bitmap(url) {
  const answer = await fetch(url);
  if (!answer.ok) {
    const said = await answer.text();
    throw new Error(JSON.parse(said).error ?? said);
  }
  // Numbers are stored in the colours: they must come as they are.
  return createImageBitmap(await answer.blob(), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
}

function remember(key, make) {
  let found = kept.get(key);
  if (!found) {
    found = make();
    found.catch(() => kept.delete(key));
  }
  kept.delete(key);
  kept.set(key, found);
  while (kept.size > 2 * MOST) kept.delete(kept.keys().next().value);
  return found;
}

export const picture = (sequence, frame) =>
  remember(`${sequence}/${frame.index}`, () => bitmap(address("image", sequence, frame)));

export const regions = (sequence, frame) =>
  remember(`${sequence}/${frame.index}/${frame.key}`, async () =>
    new Regions(await bitmap(`${address("regions.png", sequence, frame)}&key=${frame.key}`)));

class Regions {
  constructor(image) {
    const { width, height } = image;
    const canvas = new OffscreenCanvas(width, height);
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    pen.drawImage(image, 0, 0);
    const pixels = pen.getImageData(0, 0, width, height).data;
    this.width = width;
    this.height = height;
    this.number = new Uint16Array(width * height);
    this.what = new Uint8Array(width * height);
    this.box = []; // of each region: left, top, right, bottom (the last ones in it), pixels
    for (let at = 0, from = 0; at < this.number.length; at++, from += 4) {
      const number = pixels[from] | (pixels[from + 1] << 8);
      if (!number) continue;
      this.number[at] = number;
      this.what[at] = pixels[from + 2];
      const x = at % width;
      const y = (at - x) / width;
      const box = this.box[number];
      if (!box) this.box[number] = { left: x, top: y, right: x, bottom: y, pixels: 1, at, erased: pixels[from + 2] === 128 };
      else {
        if (x < box.left) box.left = x;
        if (x > box.right) box.right = x;
        box.bottom = y;
        box.pixels++;
      }
    }
  }

  at(x, y) {
    return x >= 0 && y >= 0 && x < this.width && y < this.height ? this.number[y * this.width + x] : 0;
  }

  // The label: red where it is, dotted where it was.
  draw(canvas) {
    canvas.width = this.width;
    canvas.height = this.height;
    const pen = canvas.getContext("2d");
    const made = pen.createImageData(this.width, this.height);
    const out = new Uint32Array(made.data.buffer); // ABGR
    for (let at = 0; at < out.length; at++) {
      if (this.what[at] === 255) out[at] = 0xff4040ff;
      else if (this.what[at] === 128 && ((at % this.width) + Math.floor(at / this.width)) % 6 < 2) out[at] = 0xffd0a060;
    }
    pen.putImageData(made, 0, 0);
  }

  light(pen, number) {
    const box = this.box[number];
    if (!box) return;
    const width = box.right - box.left + 1;
    const height = box.bottom - box.top + 1;
    const made = pen.createImageData(width, height);
    const out = new Uint32Array(made.data.buffer);
    for (let y = 0; y < height; y++) {
      const row = (box.top + y) * this.width + box.left;
      for (let x = 0; x < width; x++) if (this.number[row + x] === number) out[y * width + x] = 0x9000e6ff;
    }
    pen.putImageData(made, box.left, box.top);
  }
}
