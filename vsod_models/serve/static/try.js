// The page that takes a clip and shows what is salient in it.

import { ask, byId, json } from "./server.js";
import { Viewer } from "./viewer.js";

let about; // a promise: the server may still be starting
let viewer;
let clip = null; // as uploaded
let job = null; // the prediction that is shown
let shown = ""; // id of the job whose preview is on the screen
let jobs = [];
let timer = 0;
const wanted = new Set(); // ids of files to save when they are there

export function startTry(said) {
  about = said;
  viewer = new Viewer();
  about.then(({ models }) => byId("model").replaceChildren(...models.map((name, i) => new Option(name, i))));
  const drop = byId("drop");
  const file = byId("file");
  byId("choose").onclick = byId("other").onclick = () => file.click();
  file.onchange = () => file.files[0] && upload(file.files[0]);
  byId("example").onclick = byId("example-again").onclick = takeExample;
  // Anywhere on the page: a browser would leave it for the file.
  for (const kind of ["dragenter", "dragover"]) {
    addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  addEventListener("dragleave", () => drop.classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files[0] && !byId("try").hidden) upload(event.dataTransfer.files[0]);
  });
  byId("settings").onsubmit = (event) => { event.preventDefault(); run(); };
  byId("cancel").onclick = () => job && act(() => json(`/api/jobs/${job.id}/cancel`, {}));
  byId("view").onchange = changeView;
  for (const button of downloads()) button.onclick = () => download(button);
  poll();
}

async function act(what) {
  byId("error").textContent = "";
  try {
    await what();
  } catch (error) {
    byId("error").textContent = error.message;
  }
  poll();
}

function busy(text) {
  byId("status").textContent = text;
  for (const id of ["choose", "example", "other", "example-again", "run"]) {
    byId(id).disabled = Boolean(text) || (!clip && !["choose", "example"].includes(id));
  }
}

function upload(file) {
  act(async () => {
    const { max_mb: most } = await about;
    if (file.size > most * 2 ** 20) throw new Error(`${file.name}: larger than the ${most} MB that this server takes`);
    await send(file);
  });
}

function send(file) {
  return new Promise((done, failed) => {
    const sending = new XMLHttpRequest(); // fetch does not tell how far an upload is
    sending.open("POST", `/api/clips?name=${encodeURIComponent(file.name)}`);
    sending.upload.onprogress = (event) => {
      byId("progress").value = event.loaded / event.total;
      busy(`Uploading ${file.name}: ${Math.round(100 * event.loaded / event.total)} %`);
    };
    sending.onload = () => {
      busy("");
      byId("progress").value = 0;
      byId("status").textContent = "Nothing is running.";
      let said = {};
      try { said = JSON.parse(sending.responseText); } catch { said.error = sending.responseText; }
      if (sending.status === 200) { take(said); done(); } else failed(new Error(said.error));
    };
    sending.onerror = () => { busy(""); failed(new Error(`${file.name}: the upload broke off`)); };
    busy(`Uploading ${file.name}`);
    sending.send(file);
  });
}

function takeExample() {
  act(async () => {
    busy("Making the example clip");
    let said;
    try { said = await json("/api/example", {}); } finally { busy(""); }
    take(said);
  });
}

function take(said) {
  clip = said;
  job = null;
  shown = "";
  const kind = clip.picture ? "picture" : `${clip.frames ?? "?"} frames, ${clip.rate.toFixed(clip.rate % 1 ? 2 : 0)} a second`;
  byId("clip").textContent = `${clip.name}: ${clip.width}x${clip.height}, ${kind}${clip.sound ? ", with sound" : ""}`;
  byId("file").value = "";
  byId("progress").value = 0;
  busy("");
  byId("status").textContent = "Ready.";
  byId("runs-on").textContent = byId("notes").textContent = "";
  const [png] = downloads().slice(-1);
  png.textContent = clip.picture ? "PNG" : "PNG (zip)";
  viewer.picture(`/api/clips/${clip.id}/first.jpg`, false, clip);
  byId("run").focus();
}

function run() {
  if (!clip) return;
  act(async () => {
    job = await json("/api/jobs", {
      clip: clip.id, model: Number(byId("model").value), view: byId("view").value,
      crf: byId("crf").value || null,
    });
    shown = "";
  });
}

function changeView() {
  if (job?.state !== "done") return;
  shown = "";
  drawDownloads();
  if (byId("view").value === job.view) { poll(); return; }
  act(() => json(`/api/jobs/${job.id}/files`, { view: byId("view").value, format: "preview" }));
}

async function poll() {
  clearTimeout(timer);
  try {
    jobs = (await json("/api/jobs")).jobs;
    show();
  } catch { /* the header says it */ }
  const active = jobs.some((one) => one.state === "running" || one.state === "waiting");
  clearTimeout(timer);
  timer = setTimeout(poll, active ? 100 : 2000);
}

function show() {
  if (job) job = jobs.find((one) => one.id === job.id) ?? null;
  drawQueue();
  if (!job) {
    byId("cancel").disabled = true;
    shown = "";
    drawDownloads();
    return;
  }
  byId("cancel").disabled = !["waiting", "running"].includes(job.state);
  byId("runs-on").textContent = job.runs_on;
  const share = job.state === "done" ? 1 : job.done / (job.total || 1);
  byId("progress").value = share;
  byId("status").textContent = told(job);
  if (job.state === "failed") byId("error").textContent = job.error;
  if (job.state === "running" && job.done) viewer.live(`/api/jobs/${job.id}/latest.jpg?n=${job.done}`, clip);
  const view = byId("view").value;
  const preview = view === job.view ? job
    : jobs.find((one) => one.of === job.id && one.format === "preview" && one.view === view);
  if (preview?.state === "failed") byId("error").textContent = preview.error;
  if (job.state === "done" && preview?.state === "done" && shown !== preview.id) {
    shown = preview.id;
    const address = `/api/jobs/${preview.id}/file`;
    if (job.clip.picture) viewer.picture(address, true, job.clip);
    else viewer.video(address, job.clip);
  }
  for (const one of jobs) {
    if (wanted.has(one.id) && one.state === "failed") {
      wanted.delete(one.id);
      byId("error").textContent = one.error;
    }
    if (wanted.has(one.id) && one.state === "done") {
      wanted.delete(one.id);
      const link = document.createElement("a");
      link.href = `/api/jobs/${one.id}/file`;
      link.download = "";
      link.click();
      byId("notes").textContent = one.notes.join(" ");
    }
  }
  drawDownloads();
}

function told(one) {
  const of = one.total ? `${one.done} of ${one.total} frames` : `${one.done} frames`;
  if (one.state === "waiting") return "Waiting for its turn.";
  if (one.state === "running") return one.done ? `${of}, ${one.speed.toFixed(1)} frames/s` : "Loading the model";
  if (one.state === "done") return `Done: ${of}, ${one.speed.toFixed(1)} frames/s.`;
  return one.state === "failed" ? "It failed." : "Cancelled.";
}

const downloads = () => [...document.querySelectorAll("[data-format]")];

// They can be had once the result is on the screen, each again once it was saved.
function drawDownloads() {
  const view = byId("view").value;
  for (const button of downloads()) {
    const { format } = button.dataset;
    const alpha = view === "matte" && format === "mp4";
    const coming = jobs.some((one) => wanted.has(one.id) && one.view === view && one.format === format);
    button.disabled = !shown || alpha || coming;
    button.title = alpha ? "MP4 has no alpha: take MOV or WebM, or the cutout" : "";
  }
}

function download(button) {
  act(async () => {
    button.disabled = true;
    try {
      const asked = { view: byId("view").value, format: button.dataset.format };
      wanted.add((await json(`/api/jobs/${job.id}/files`, asked)).id);
    } catch (error) { button.disabled = false; throw error; }
  });
}

function drawQueue() {
  const list = byId("queue");
  const rows = jobs.filter((one) => one.state !== "done" || !one.of).reverse();
  const focused = document.activeElement?.dataset?.job;
  list.replaceChildren(...rows.map((one) => {
    const row = document.createElement("li");
    const text = document.createElement("span");
    const what = one.of ? `${one.format === "preview" ? one.view : `${one.view} as ${one.format}`} of ${one.clip.name}` : one.clip.name;
    const share = one.total && one.state === "running" ? ` ${Math.round(100 * one.done / one.total)} %` : "";
    text.textContent = `${what}: ${one.state}${share}`;
    row.append(text);
    const active = ["waiting", "running"].includes(one.state);
    if (!one.of && one.id !== job?.id && !active) row.append(rowButton(one, "Show", () => open(one)));
    row.append(active
      ? rowButton(one, "Cancel", () => act(() => json(`/api/jobs/${one.id}/cancel`, {})))
      : rowButton(one, "Remove", () => act(() => ask(`/api/jobs/${one.id}`, { method: "DELETE" }))));
    return row;
  }));
  if (focused) list.querySelector(`[data-job="${focused}"]`)?.focus();
}

function rowButton(one, text, action) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.dataset.job = `${one.id}-${text}`;
  button.setAttribute("aria-label", `${text} ${one.clip.name}`);
  button.onclick = action;
  return button;
}

function open(one) {
  take(one.clip);
  job = one;
  byId("view").value = one.view;
  poll();
}
