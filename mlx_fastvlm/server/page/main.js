/** Puts the page together: what is shown, what is asked, and which button does what just now. */

import { AnswerView } from "./answer_view.js";
import { Api, ServerGone } from "./api.js";
import { Camera, CameraError } from "./camera.js";
import { CameraView } from "./camera_view.js";
import { byId, relabel } from "./dom.js";
import { History } from "./history.js";
import { HistoryView } from "./history_view.js";
import { askForKey } from "./key_dialog.js";
import { Live } from "./live.js";
import { Notices } from "./notices.js";
import { frameOf } from "./pictures.js";
import { PresetView } from "./preset_view.js";
import { Presets } from "./presets.js";
import { Session } from "./session.js";
import { Settings } from "./settings.js";
import { SettingsView } from "./settings_view.js";
import { listen } from "./shortcuts.js";
import { Stage } from "./stage.js";
import { bindTheme, nextTheme } from "./theme.js";

const TYPING_MS = 800; // without a key, after which a question is taken for whole
const NO_SERVER = "The server does not answer. Start it with mlx-fastvlm serve; the page goes on by itself.";
const NO_PICTURE = "That is no picture. JPEG, PNG, WebP, GIF, HEIC and PDF files can be asked about, among others.";

const video = byId("video");
const settings = new Settings();
const presets = new Presets(settings);
const notices = new Notices(byId("notices"));
const api = new Api(askForKey);
const session = new Session(api);
const history = new History();
const answerView = new AnswerView(session);
const historyView = new HistoryView(history, notices);
const settingsView = new SettingsView(settings);
const stage = new Stage(onPictures, () => notices.show("stage", NO_PICTURE));
const camera = new Camera(video, onCameraEnded);
const live = new Live(video, async () => (isReady() ? ask([currentFrame()]) : null));
const cameraView = new CameraView({ settings, camera, live, video, start: startCamera });

let lastAnswer = null; // that a question can follow
let loading = null; // a promise, while the server is asked for its models
let inTurn = null; // the pictures that are asked about one after another

/** Whether there is a model to ask; if not, the server is asked for one, and its user perhaps for the key. */
function isReady() {
  if (settingsView.model === undefined) loadModels();
  return settingsView.model !== undefined;
}

function ask(pictures, more = {}) {
  return session.ask({
    pictures,
    prompt: presets.question,
    model: settingsView.model,
    view: settingsView.view,
    maxTokens: settingsView.maxTokens,
    temperature: settings.get("temperature"),
    ...more,
  });
}

function currentFrame() {
  return frameOf(video, settingsView.view, camera.kind === "screen" ? "Screen" : "Camera");
}

async function askAboutPictures() {
  if (!isReady()) return;
  const { pictures } = stage;
  if (settings.get("several") === "together") {
    await ask(pictures.slice(0, settingsView.facts.max_images));
    return;
  }
  inTurn = pictures;
  for (const [index, picture] of pictures.entries()) {
    stage.show(index);
    const answer = await ask([picture]);
    if (inTurn !== pictures) return; // stopped, or other pictures have come
    if (answer === null) break;
  }
  inTurn = null;
  showControls();
}

async function followUp(text) {
  stop();
  await ask([], { prompt: text, followed: lastAnswer });
}

function stop() {
  inTurn = null;
  live.stop();
  session.stop();
}

function startCamera(wish = { deviceId: settings.get("cameraId") }) {
  return showLive(() => camera.start(wish));
}

function startScreen() {
  return showLive(() => camera.share());
}

async function showLive(start) {
  stop();
  live.unwatch();
  try {
    if (!(await start())) return; // something else was chosen meanwhile
  } catch (error) {
    if (!(error instanceof CameraError)) throw error;
    notices.show("stage", error.message);
    stage.showNothing();
    showControls();
    return;
  }
  notices.dismiss("stage");
  stage.showLive();
  cameraView.show();
  live.watch();
  if (settings.get("mode") === "continuous") live.run();
  showControls();
}

function turnOff() {
  stop();
  live.unwatch();
  camera.stop();
  stage.showNothing();
  showControls();
}

function onCameraEnded() {
  turnOff();
  notices.show("stage", "The camera or screen is no longer there. Start it again, or drop a picture on the page.");
}

function onPictures() {
  stop();
  live.unwatch();
  camera.stop();
  notices.dismiss("stage");
  showControls();
  if (settings.get("askAtOnce")) askAboutPictures();
}

/** What the large button does now: an icon, words and an action. */
function primary() {
  if (session.isBusy || live.isRunning || inTurn) return ["stop", "Stop", stop];
  if (stage.shows === "nothing") return ["camera", "Start camera", () => startCamera()];
  if (stage.shows === "live") {
    const isContinuous = settings.get("mode") === "continuous";
    return isContinuous ? ["play", "Start", () => live.run()] : ["shutter", "Capture", () => live.shoot()];
  }
  const [number, most] = [stage.pictures.length, settingsView.facts.max_images];
  if (number === 1) return ["play", "Ask", askAboutPictures];
  if (settings.get("several") === "each") return ["play", "Ask about each", askAboutPictures];
  return ["play", number > most ? `Ask about the first ${most}` : `Ask about all ${number}`, askAboutPictures];
}

function showControls() {
  const [iconName, label] = primary();
  relabel(byId("primary"), iconName, label);
  byId("primary").classList.toggle("stops", label === "Stop");
  byId("use-camera").setAttribute("aria-pressed", String(camera.kind === "camera"));
  byId("use-screen").setAttribute("aria-pressed", String(camera.kind === "screen"));
  document.body.dataset.source = camera.kind ?? "none";
  byId("follow-up").disabled = byId("follow-up-ask").disabled = lastAnswer === null;
  byId("copy-answer").disabled = lastAnswer === null;
  answerView.showLoop(live);
}

function bindButtons() {
  byId("primary").onclick = () => primary()[2]();
  byId("use-camera").onclick = () => (camera.kind === "camera" ? turnOff() : startCamera());
  byId("use-screen").hidden = !navigator.mediaDevices?.getDisplayMedia; // phones have none
  byId("use-screen").onclick = () => (camera.kind === "screen" ? turnOff() : startScreen());
  byId("use-files").onclick = () => byId("files").click();
  byId("help").onclick = () => byId("help-dialog").showModal();
  byId("help-close").onclick = () => byId("help-dialog").close();
  byId("copy-answer").onclick = () => historyView.copy(byId("answer").textContent);
  byId("follow-up-form").onsubmit = (event) => {
    event.preventDefault();
    const text = byId("follow-up").value.trim();
    if (text) followUp(text);
    byId("follow-up").value = "";
  };
}

function bindKeys() {
  const keys = {
    escape: stop,
    " ": () => primary()[2](),
    c: () => byId("use-camera").click(),
    o: () => byId("use-files").click(),
    m: () => settings.set("mode", settings.get("mode") === "continuous" ? "single" : "continuous"),
    f: () => byId("follow-up").focus(),
    p: () => byId("prompt").focus(),
    t: () => nextTheme(settings),
    "?": () => byId("help-dialog").showModal(),
  };
  for (let digit = 1; digit <= 9; digit += 1) {
    keys[digit] = () => presets.list[digit - 1] && presets.choose(presets.list[digit - 1].id);
  }
  listen(keys, () => settings.get("shortcuts"));
}

function bindChanges() {
  session.addEventListener("state", () => {
    showControls();
    if (session.state === "error") notices.show("answer", session.problem);
    if (session.state === "generating") notices.dismiss("answer");
  });
  session.addEventListener("end", ({ detail: answer }) => {
    const isWhole = answer.finishReason !== "stopped";
    if (isWhole || answer.text) history.add(answer);
    if (isWhole) lastAnswer = answer;
    showControls();
  });
  session.addEventListener("back", loadModels); // it may be another server by now
  live.addEventListener("look", () => answerView.showLoop(live));
  live.addEventListener("run", showControls);
  let typing = null;
  presets.addEventListener("choose", () => live.forget());
  presets.addEventListener("edit", () => {
    live.hold();
    clearTimeout(typing);
    typing = setTimeout(() => live.forget(), TYPING_MS);
  });
  settings.follow("keepHistory", (isKept) => history.keep(isKept));
  settings.addEventListener("change", ({ detail: name }) => {
    if (name === "mode") stop();
    if (["model", "resolution", "fit"].includes(name)) live.forget();
    showControls();
  });
}

/** Learn of the server's models; once at a time, however often it is asked for. */
function loadModels() {
  loading ??= askForModels().finally(() => (loading = null));
  return loading;
}

async function askForModels() {
  try {
    settingsView.offer(await patientlyAskForModels());
    notices.dismiss("server");
  } catch (error) {
    notices.show("server", error.message, { action: { label: "Try again", run: loadModels } });
  }
}

async function patientlyAskForModels() {
  for (;;) {
    try {
      return await api.models();
    } catch (error) {
      if (!(error instanceof ServerGone)) throw error;
      notices.show("server", NO_SERVER);
      await api.untilBack();
    }
  }
}

new PresetView(presets);
bindTheme(settings);
bindButtons();
bindChanges();
bindKeys();
showControls();
await loadModels();
