// The page on which a person corrects coarse labels.

import { byId, json } from "./server.js";
import { picture, regions } from "./regions.js";

const NEAR = [1, 2, 3, 4, -1]; // frames that are fetched before they are asked for
const state = {
  version: "", sequences: [], sequence: "", frames: [], index: 0, tool: "point", adds: false,
  regions: null, lit: 0, cross: null, path: null, carrying: false,
};
const marks = byId("marks");
const pen = marks.getContext("2d");
const easel = byId("easel");

export async function startCorrect() {
  for (const button of document.querySelectorAll("[data-tool]")) button.onclick = () => choose(button.dataset.tool);
  byId("adds").onclick = () => { state.adds = !state.adds; byId("adds").setAttribute("aria-pressed", state.adds); paint(); };
  byId("previous").onclick = () => go(state.index - 1);
  byId("next").onclick = () => go(state.index + 1);
  byId("seek").oninput = () => go(Number(byId("seek").value));
  byId("opacity").oninput = () => { byId("label").style.opacity = byId("opacity").value; };
  byId("contrast").oninput = () => { byId("frame").style.filter = `contrast(${byId("contrast").value})`; };
  byId("radius").oninput = () => paint();
  byId("undo").onclick = () => step("undo");
  byId("redo").onclick = () => step("redo");
  byId("carry").onclick = carryOn;
  byId("stop").onclick = () => act({ act: "stop" }, "It stops here.");
  byId("right").onclick = () => mark("all right");
  byId("skip").onclick = () => mark("skip");
  byId("reload").onclick = () => load(true);
  byId("opacity").oninput();
  listen();
  await load(false);
}

async function guarded(what) {
  byId("wrong").textContent = "";
  try {
    return await what();
  } catch (error) {
    if (error.details?.conflict) {
      byId("conflict-text").textContent = `${error.message} Nothing of this step was written.`;
      byId("conflict").hidden = false;
      byId("reload").focus();
    } else {
      byId("wrong").textContent = error.message;
    }
    return undefined;
  }
}

const say = (text) => { byId("said").textContent = text; };

async function load(keep) {
  say("Reading the labels");
  await guarded(async () => {
    const all = await json("/api/labels");
    byId("conflict").hidden = true;
    Object.assign(state, { version: all.version, sequences: all.sequences });
    byId("undo").disabled = !all.undo;
    byId("redo").disabled = !all.redo;
    const wished = keep ? state.sequence : sessionStorage.getItem("sequence");
    const first = all.sequences.find((one) => one.name === wished)
      ?? all.sequences.find((one) => one.looked < one.frames) ?? all.sequences[0];
    say("");
    await openSequence(first.name, keep ? state.index : Number(sessionStorage.getItem("index") ?? -1));
  });
}

async function openSequence(name, index = -1) {
  state.sequence = name;
  state.frames = await json(`/api/labels/frames?sequence=${encodeURIComponent(name)}`);
  byId("seek").max = state.frames.length - 1;
  byId("where").dataset.longest = state.frames.map(place).reduce((a, b) => (a.length < b.length ? b : a));
  if (index < 0) index = state.frames.findIndex((frame) => !frame.looked);
  drawSequences();
  await go(Math.max(0, index));
}

function drawSequences() {
  const list = byId("sequences");
  const focused = document.activeElement?.dataset?.sequence;
  let looked = 0;
  let total = 0;
  list.replaceChildren(...state.sequences.map((one) => {
    looked += one.looked;
    total += one.frames;
    const row = document.createElement("button");
    row.type = "button";
    row.setAttribute("role", "option");
    row.dataset.sequence = one.name;
    row.setAttribute("aria-selected", one.name === state.sequence);
    const name = document.createElement("span");
    name.textContent = one.name;
    const count = document.createElement("span");
    count.textContent = `${one.looked}/${one.frames}`;
    count.className = "quiet";
    const bar = document.createElement("progress");
    bar.max = one.frames;
    bar.value = one.looked;
    bar.setAttribute("aria-hidden", "true");
    row.append(name, count, bar);
    row.onclick = () => guarded(() => openSequence(one.name));
    return row;
  }));
  byId("looked").textContent = `${looked} of ${total} frames looked over`;
  if (focused) list.querySelector(`[data-sequence="${CSS.escape(focused)}"]`)?.focus();
}

const place = (frame) => `${frame.index + 1} of ${state.frames.length}: ${frame.name}`;

async function go(index) {
  if (index < 0 || index >= state.frames.length) {
    say(index < 0 ? "This is the first frame." : "This is the last frame of the sequence.");
    return;
  }
  state.index = index;
  state.path = null;
  sessionStorage.setItem("sequence", state.sequence);
  sessionStorage.setItem("index", index);
  const frame = state.frames[index];
  byId("seek").value = index;
  byId("where").textContent = place(frame);
  await draw();
  for (const near of NEAR) {
    const other = state.frames[index + near];
    if (other) Promise.all([picture(state.sequence, other), regions(state.sequence, other)]).catch(() => {});
  }
}

async function draw() {
  const frame = state.frames[state.index];
  const { sequence } = state;
  const wentOn = () => frame !== state.frames[state.index] || sequence !== state.sequence;
  await guarded(async () => {
    const [image, found] = await Promise.all([picture(sequence, frame), regions(sequence, frame)]);
    if (wentOn()) return;
    const canvas = byId("frame");
    canvas.width = image.width;
    canvas.height = image.height;
    canvas.getContext("2d").drawImage(image, 0, 0);
    easel.style.setProperty("--ratio", `${image.width} / ${image.height}`);
    found.draw(byId("label"));
    marks.width = image.width;
    marks.height = image.height;
    state.regions = found;
    state.lit = 0;
    const at = state.cross;
    if (at) state.cross = [Math.min(at[0], image.width - 1), Math.min(at[1], image.height - 1)];
    paint();
  });
  if (wentOn()) return;
  const stamp = byId("stamp");
  stamp.hidden = frame.mark === "open";
  stamp.textContent = frame.mark === "skip" ? "Skipped" : "All right";
  byId("right").setAttribute("aria-pressed", frame.mark === "all right");
  byId("skip").setAttribute("aria-pressed", frame.mark === "skip");
  byId("stop").disabled = !frame.carried;
  byId("carry").disabled = !(frame.edits || frame.carried);
  drawStrip();
  easel.dataset.shown = `${sequence}/${frame.index}/${frame.key}`;
}

function drawStrip() {
  const canvas = byId("strip");
  canvas.width = state.frames.length;
  const brush = canvas.getContext("2d");
  state.frames.forEach((frame, x) => {
    brush.fillStyle = x === state.index ? "#1b66c9" : frame.mark === "skip" ? "#8a8f94"
      : frame.mark === "all right" ? "#2f8f4e" : frame.edits ? "#d98a1f" : frame.carried ? "#e6bf83" : "#c9ced3";
    brush.fillRect(x, 0, 1, 8);
  });
}

// What lies over the frame: the lit region, the cross, what is being drawn.

function paint() {
  pen.clearRect(0, 0, marks.width, marks.height);
  if (!state.regions) return;
  if (state.lit) state.regions.light(pen, state.lit);
  const thick = Math.max(1, marks.width / 600);
  pen.lineWidth = thick;
  pen.strokeStyle = state.adds ? "#18c75a" : "#ffd400";
  pen.fillStyle = state.adds ? "rgb(24 199 90 / .4)" : "rgb(255 212 0 / .4)";
  const { path } = state;
  if (path && state.tool === "box") {
    const [x0, y0, x1, y1] = corners(path);
    pen.fillRect(x0, y0, x1 - x0, y1 - y0);
    pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
  } else if (path) {
    pen.beginPath();
    path.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
    if (state.tool === "polygon") { pen.fill(); pen.stroke(); } else {
      pen.lineCap = pen.lineJoin = "round";
      pen.lineWidth = 2 * radius() + 1;
      pen.globalAlpha = 0.5;
      if (path.length === 1) pen.lineTo(path[0][0] + 0.01, path[0][1]);
      pen.stroke();
      pen.globalAlpha = 1;
      pen.lineWidth = thick;
    }
  }
  if (state.cross) {
    const [x, y] = state.cross;
    pen.beginPath();
    for (const [dx, dy] of [[1, 0], [0, 1]]) {
      pen.moveTo(x - 9 * thick * dx, y - 9 * thick * dy);
      pen.lineTo(x + 9 * thick * dx, y + 9 * thick * dy);
    }
    if (state.tool === "brush") { pen.moveTo(x + radius(), y); pen.arc(x, y, radius(), 0, 7); }
    pen.stroke();
  }
}

const radius = () => Number(byId("radius").value);

function corners(path) {
  const [[x0, y0], [x1, y1]] = [path[0], path[path.length - 1]];
  const clamp = (v, most) => Math.max(0, Math.min(v, most));
  return [clamp(Math.min(x0, x1), marks.width), clamp(Math.min(y0, y1), marks.height),
    clamp(Math.max(x0, x1) + 1, marks.width), clamp(Math.max(y0, y1) + 1, marks.height)];
}

function light(number) {
  if (number === state.lit) return;
  state.lit = number;
  paint();
}

function pixel(event) {
  const box = easel.getBoundingClientRect();
  const scale = Math.min(easel.clientWidth / marks.width, easel.clientHeight / marks.height);
  const left = box.left + easel.clientLeft + (easel.clientWidth - scale * marks.width) / 2;
  const top = box.top + easel.clientTop + (easel.clientHeight - scale * marks.height) / 2;
  return [Math.floor((event.clientX - left) / scale), Math.floor((event.clientY - top) / scale)];
}

function listen() {
  easel.addEventListener("pointerdown", (event) => {
    if (event.button || !state.regions) return;
    state.cross = null;
    const at = pixel(event);
    if (state.tool === "point") { usePoint(at); return; }
    easel.setPointerCapture(event.pointerId);
    state.path = [at];
    paint();
  });
  easel.addEventListener("pointermove", (event) => {
    if (!state.regions) return;
    const at = pixel(event);
    if (state.path && event.buttons) {
      const last = state.path[state.path.length - 1];
      if (last[0] !== at[0] || last[1] !== at[1]) state.path.push(at);
      paint();
    } else if (state.tool === "point") light(state.regions.at(...at));
  });
  easel.addEventListener("pointerleave", () => { if (!state.cross) light(0); });
  easel.addEventListener("pointerup", () => { if (state.path && !state.cross) useDrawn(); });
  easel.addEventListener("pointercancel", () => { state.path = null; paint(); });
  document.addEventListener("keydown", (event) => {
    if (byId("correct").hidden) return;
    if (event.target.closest("input") && /^(Arrow|Home|End|Page)/.test(event.key)) return; // a slider's own
    if (event.target.closest("button, summary, a") && [" ", "Enter"].includes(event.key)) return;
    if (keyed(event)) event.preventDefault();
  });
}

function keyed(event) {
  const { key } = event;
  if (event.ctrlKey || event.metaKey) {
    if (key.toLowerCase() === "z") step(event.shiftKey ? "redo" : "undo");
    else if (key.toLowerCase() === "y") step("redo");
    else return false;
    return true;
  }
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  if (way && event.shiftKey) { moveCross(way, event.altKey ? 1 : Math.max(2, Math.round(marks.width / 100))); return true; }
  const does = {
    ArrowLeft: () => go(state.index - 1),
    ArrowRight: () => go(state.index + 1),
    Enter: () => (state.tool === "polygon" && state.path?.length > 2 ? useDrawn() : mark("all right")),
    s: () => mark("skip"),
    1: () => choose("point"), 2: () => choose("box"), 3: () => choose("polygon"), 4: () => choose("brush"),
    a: () => byId("adds").click(),
    r: () => nextRegion(event.shiftKey ? -1 : 1),
    " ": useCross,
    c: carryOn,
    x: () => act({ act: "stop" }, "It stops here."),
    z: () => step("undo"),
    y: () => step("redo"),
    "+": () => resize(2), "=": () => resize(2), "-": () => resize(-2),
    Escape: () => { state.path = null; state.cross = null; state.carrying = false; light(0); paint(); },
  }[key.length === 1 ? key.toLowerCase() : key];
  if (!does) return false;
  does();
  return true;
}

function choose(tool) {
  state.tool = tool;
  state.path = null;
  state.lit = 0;
  for (const button of document.querySelectorAll("[data-tool]")) button.setAttribute("aria-pressed", button.dataset.tool === tool);
  paint();
}

function resize(by) {
  byId("radius").value = radius() + by;
  paint();
}

function moveCross([dx, dy], by) {
  const from = state.cross ?? [marks.width >> 1, marks.height >> 1];
  state.cross = [Math.max(0, Math.min(marks.width - 1, from[0] + dx * by)), Math.max(0, Math.min(marks.height - 1, from[1] + dy * by))];
  if (state.tool === "point") state.lit = state.regions?.at(...state.cross) ?? 0;
  if (state.path && state.tool === "box") state.path[1] = state.cross;
  if (state.path && state.tool === "brush" && by) state.path.push(state.cross);
  paint();
  byId("spoken").textContent = `${state.cross.join(", ")}${state.lit ? `, ${described(state.lit)}` : ""}`;
}

function described(number) {
  const box = state.regions.box[number];
  return `${box.erased ? "erased " : ""}region of ${box.pixels} pixels`;
}

function nextRegion(way) {
  const all = Object.keys(state.regions?.box ?? []).map(Number).sort((a, b) => state.regions.box[b].pixels - state.regions.box[a].pixels);
  if (!all.length) { say("There is no region in this frame."); return; }
  choose("point");
  const from = all.indexOf(state.regions.at(...(state.cross ?? [-1, -1])));
  const number = all[(from + way + all.length) % all.length];
  const { at } = state.regions.box[number];
  state.cross = [at % state.regions.width, Math.floor(at / state.regions.width)];
  state.lit = number;
  paint();
  byId("spoken").textContent = `${all.indexOf(number) + 1} of ${all.length}: ${described(number)}`;
}

function useCross() {
  if (!state.cross) { moveCross([0, 0], 0); return; }
  if (state.tool === "point") usePoint(state.cross);
  else if (state.tool === "polygon") { (state.path ??= []).push(state.cross); paint(); }
  else if (state.path) useDrawn();
  else { state.path = state.tool === "box" ? [state.cross, state.cross] : [state.cross]; paint(); }
}

function usePoint([x, y]) {
  const number = state.regions.at(x, y);
  if (!number) { say("There is no region here."); return; }
  edit({ point: [x, y], ...(state.regions.box[number].erased ? { add: true } : {}) });
}

function useDrawn() {
  const { path, tool } = state;
  state.path = null;
  paint();
  const add = state.adds ? { add: true } : {};
  if (tool === "box") {
    const box = corners(path);
    if (box[2] - box[0] > 1 || box[3] - box[1] > 1) edit({ box, ...add });
  } else if (tool === "polygon") {
    if (path.length > 2) edit({ polygon: path, ...add });
  } else edit({ brush: path, radius: radius(), ...add });
}

const edit = (entry) => act({ act: "edit", entry }, entry.add ? "Added." : "Erased.");

// One step after the other: each is made on what the one before it left.

let before = Promise.resolve();

async function act(what, then) {
  const of = { sequence: state.sequence, index: state.index };
  const turn = before.then(() => guarded(async () => {
    const said = await json("/api/labels", { ...of, version: state.version, ...what });
    take(said);
    return said;
  }));
  before = turn;
  const answer = await turn;
  if (!answer) return undefined;
  say(then);
  if (answer.changed.some((frame) => frame.sequence === state.sequence && frame.index === state.index)) await draw();
  else drawStrip();
  return answer;
}

function take(answer) {
  state.version = answer.version;
  byId("undo").disabled = !answer.undo;
  byId("redo").disabled = !answer.redo;
  const here = state.sequences.find((one) => one.name === state.sequence);
  for (const frame of answer.changed) if (frame.sequence === state.sequence) state.frames[frame.index] = frame;
  if (here) here.looked = state.frames.filter((frame) => frame.looked).length;
  drawSequences();
}

async function mark(as) {
  const frame = state.frames[state.index];
  const { index } = state;
  const answer = await act({ act: "edit", entry: { mark: frame.mark === as ? "open" : as } }, as === "skip" ? "Skipped." : "All right.");
  if (answer && frame.mark !== as && index + 1 < state.frames.length) await go(index + 1);
}

async function step(which) {
  const answer = await act({ act: which }, which === "undo" ? "Undone." : "Done again.");
  if (!answer) return;
  const there = answer.changed.find((frame) => frame.sequence === state.sequence && frame.index === state.index) ?? answer.changed[0];
  if (there && there.sequence !== state.sequence) await openSequence(there.sequence, there.index);
  else if (there && there.index !== state.index) await go(there.index);
}

async function carryOn() {
  if (state.carrying) { state.carrying = false; return; }
  state.carrying = true;
  byId("carry").textContent = "Stop carrying";
  const from = state.index;
  let at = from;
  let done = 0;
  while (state.carrying) {
    const answer = await act({ act: "carry", index: at }, `Carried on to ${done} frames`);
    if (!answer) break;
    at = answer.reached;
    done += answer.changed.length ? 1 : 0;
    say(`Carried on to ${done} frames, as far as ${state.frames[at].name}.`);
    if (answer.ended) break;
  }
  state.carrying = false;
  byId("carry").textContent = "Carry on";
}
