// Original and result on one canvas.  A preview holds both, one above the other, in one video:
// they are in step whatever the browser does.

import { byId } from "./server.js";

export class Viewer {
  constructor() {
    this.canvas = byId("screen");
    this.pen = this.canvas.getContext("2d");
    this.film = document.createElement("video");
    this.film.playsInline = true;
    this.film.loop = true;
    this.source = null; // a video or a picture
    this.paired = false;
    this.loading = false;
    this.pending = null;
    this.rate = 25;
    this.edge = byId("edge");
    this.scrub = byId("scrub");
    this.play = byId("play");
    this.listen();
  }

  listen() {
    this.edge.oninput = () => this.draw();
    for (const radio of document.querySelectorAll("[name=compare]")) radio.onchange = () => this.draw();
    this.play.onclick = () => this.toggle();
    this.scrub.oninput = () => { this.film.pause(); this.film.currentTime = Number(this.scrub.value); };
    this.film.onplay = this.film.onpause = () => {
      const playing = !this.film.paused;
      this.play.textContent = playing ? "❚❚" : "▶";
      this.play.setAttribute("aria-label", playing ? "Pause" : "Play");
      if (playing) this.tick();
    };
    this.film.onseeked = this.film.onloadeddata = () => this.draw();
    this.film.onerror = () => { if (this.film.src) byId("error").textContent = "This browser cannot play the preview; the downloads are there."; };
    this.film.onloadedmetadata = () => {
      this.scrub.max = Math.max(0, this.film.duration - 0.5 / this.rate);
      this.film.play().catch(() => this.draw()); // a browser that starts nothing with sound by itself
    };
    const slide = (event) => {
      if (!event.buttons || !this.paired || this.beside()) return;
      const box = this.canvas.getBoundingClientRect();
      const scale = Math.min(box.width / this.canvas.width, box.height / this.canvas.height);
      const width = scale * this.canvas.width; // without the bars beside it
      this.edge.value = (event.clientX - box.left - (box.width - width) / 2) / width;
      this.draw();
    };
    this.canvas.onpointerdown = (event) => { this.canvas.setPointerCapture(event.pointerId); slide(event); };
    this.canvas.onpointermove = slide;
    document.addEventListener("keydown", (event) => {
      if (event.target.closest("input, select, button, textarea, a") || !this.film.src || byId("try").hidden) return;
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === " ") this.toggle();
      else if (step) { this.film.pause(); this.film.currentTime += step / this.rate; }
      else return;
      event.preventDefault();
    });
  }

  toggle() {
    if (this.film.paused) this.film.play();
    else this.film.pause();
  }

  beside() {
    return document.querySelector("[name=compare]:checked").value === "beside";
  }

  still() {
    this.film.removeAttribute("src");
    this.film.load();
    this.play.disabled = this.scrub.disabled = true;
    this.scrub.value = 0;
    byId("clock").textContent = "0:00.0";
  }

  video(address, clip) {
    this.pending = null;
    this.frame(clip);
    this.rate = clip.rate;
    this.source = this.film;
    this.paired = true;
    this.film.src = address;
    this.play.disabled = this.scrub.disabled = this.edge.disabled = false;
  }

  picture(address, paired, clip) {
    this.still();
    this.frame(clip);
    this.pending = null;
    this.load(address, paired);
  }

  // The newest frames while it works; those that come faster than they load are left out.
  live(address, clip) {
    if (this.source === this.film) this.still();
    this.frame(clip);
    if (this.loading) this.pending = address;
    else this.load(address, true);
  }

  load(address, paired) {
    this.loading = true;
    const made = new Image();
    const next = () => {
      this.loading = false;
      const then = this.pending;
      this.pending = null;
      if (then) this.load(then, true);
    };
    made.onload = () => {
      if (this.film.src) { next(); return; } // the video came first
      this.source = made;
      this.paired = paired;
      this.edge.disabled = !paired;
      this.draw();
      next();
    };
    made.onerror = next;
    made.src = address;
  }

  frame(clip) {
    byId("invitation").hidden = true;
    this.canvas.hidden = false;
    byId("drop").style.setProperty("--ratio", `${clip.width} / ${clip.height}`);
    this.name = clip.name;
  }

  tick() {
    this.draw();
    if (!this.film.paused) requestAnimationFrame(() => this.tick());
  }

  draw() {
    const { source, pen, canvas } = this;
    const width = source?.videoWidth || source?.naturalWidth;
    if (!width) return;
    const whole = source.videoHeight || source.naturalHeight;
    const height = this.paired ? whole / 2 : whole;
    const beside = this.paired && this.beside();
    const across = beside ? 2 * width : width;
    if (canvas.width !== across || canvas.height !== height) {
      canvas.width = across;
      canvas.height = height;
    }
    pen.drawImage(source, 0, 0, width, height, 0, 0, width, height);
    if (this.paired) {
      const edge = beside ? 0 : Math.round(this.edge.value * width);
      const to = beside ? width : edge;
      if (edge < width) pen.drawImage(source, edge, height, width - edge, height, to, 0, width - edge, height);
      if (!beside && edge > 0 && edge < width) {
        pen.fillStyle = "#fff";
        pen.fillRect(edge - 1, 0, 2, height);
      }
    }
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", this.paired ? `${this.name}: the original left, the result right` : this.name);
    if (source === this.film) {
      if (document.activeElement !== this.scrub || !this.film.paused) this.scrub.value = this.film.currentTime;
      const t = this.film.currentTime;
      byId("clock").textContent = `${Math.floor(t / 60)}:${(t % 60).toFixed(1).padStart(4, "0")}`;
    }
  }
}
