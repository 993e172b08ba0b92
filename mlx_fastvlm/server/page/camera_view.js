/** Shows what there is to choose of cameras, and the gate: how much the picture differs, and how much it must. */

import { byId, element } from "./dom.js";

/** Binds a `Camera` and the `Live` loop over its video to their card. */
export class CameraView {
  #settings;
  #camera;
  #live;
  #video;

  /** @param start called with the camera that the user wants, as `Camera.start` takes it. */
  constructor({ settings, camera, live, video, start }) {
    this.#settings = settings;
    this.#camera = camera;
    this.#live = live;
    this.#video = video;
    byId("camera").onchange = ({ target }) => {
      settings.set("cameraId", target.value);
      start({ deviceId: target.value });
    };
    byId("flip").onclick = () => {
      settings.set("cameraId", "");
      start({ facing: camera.facing === "environment" ? "user" : "environment" });
    };
    byId("mirror").onchange = ({ target }) => settings.set("mirror", target.checked ? "on" : "off");
    byId("gate").oninput = ({ target }) => settings.set("gate", Number(target.value));
    settings.follow("mirror", () => this.#showMirror());
    settings.follow("gate", (percent) => this.#showThreshold(percent));
    live.addEventListener("look", () => this.#showDifference());
    navigator.mediaDevices?.addEventListener("devicechange", () => this.show());
  }

  /** Show the camera that has been started, and the others. */
  async show() {
    this.#showMirror();
    const cameras = await this.#camera.list();
    const choices = cameras.map(({ deviceId, label }, index) =>
      element("option", { value: deviceId }, label || `Camera ${index + 1}`),
    );
    byId("camera").replaceChildren(...choices);
    byId("camera").value = this.#camera.deviceId ?? "";
    byId("flip").hidden = cameras.length < 2;
  }

  /** Only the view is mirrored, of a camera that faces the user; what is sent never is: text in it stays readable. */
  #showMirror() {
    const { kind, facing } = this.#camera;
    const wish = this.#settings.get("mirror");
    const isPossible = kind === "camera" && facing !== "environment";
    const isMirrored = isPossible && (wish === "on" || (wish === "auto" && facing === "user"));
    byId("mirror").disabled = !isPossible;
    byId("mirror").checked = isMirrored;
    this.#video.classList.toggle("mirrored", isMirrored);
  }

  #showThreshold(percent) {
    byId("gate").value = percent;
    byId("gate-figure").textContent = `${percent} %`;
    this.#live.threshold = percent;
  }

  #showDifference() {
    const { difference } = this.#live;
    const meter = byId("difference");
    meter.style.setProperty("--value", Math.min(1, (difference ?? 0) / Number(byId("gate").max)));
    meter.setAttribute("aria-valuenow", (difference ?? 0).toFixed(1));
    byId("difference-figure").textContent = difference === null ? "–" : `${difference.toFixed(1)} %`;
  }
}
