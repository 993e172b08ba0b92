/** A moving picture from the browser: a camera or the screen, shown in a video element; and why there is none. */

const IDEAL = { width: { ideal: 1280 }, height: { ideal: 720 } };
const NOTHING_SHARED = "Nothing is shared. Press Screen again, and choose what the model is to see.";

/** There is no moving picture; the message says what the user can do. */
export class CameraError extends Error {}

/** Fills a video element from a camera or the screen. */
export class Camera {
  #video;
  #onEnded;
  #stream = null;
  #attempt = 0; // the number of the latest start, or of the stop after it

  /**
   * @param video the element.
   * @param onEnded called when the picture ends without `stop`: unplugged, or no longer shared.
   */
  constructor(video, onEnded) {
    this.#video = video;
    this.#onEnded = onEnded;
  }

  /** "camera", "screen", or null when off. */
  kind = null;

  get #track() {
    return this.#stream?.getVideoTracks()[0];
  }

  /** "user" or "environment" where the browser knows it, as on phones. */
  get facing() {
    return this.#track?.getSettings().facingMode;
  }

  get deviceId() {
    return this.#track?.getSettings().deviceId;
  }

  /**
   * Show a camera.
   *
   * @param deviceId which; without one, or when it is gone, `facing` or the browser decides.
   * @param facing "user" or "environment".
   * @returns whether it is shown: not if it was stopped, or something else started, before the browser had it.
   * @throws CameraError
   */
  async start({ deviceId, facing } = {}) {
    const wish = deviceId ? { deviceId: { exact: deviceId } } : facing ? { facingMode: { ideal: facing } } : {};
    const devices = needed(navigator.mediaDevices, "getUserMedia");
    try {
      return await this.#show("camera", () => devices.getUserMedia({ video: { ...IDEAL, ...wish }, audio: false }));
    } catch (error) {
      if (deviceId && error.name === "OverconstrainedError") return this.start({ facing });
      throw explained(error);
    }
  }

  /** Show the screen, or the window that the user picks. Returns and throws as `start`. */
  async share() {
    const devices = needed(navigator.mediaDevices, "getDisplayMedia");
    try {
      return await this.#show("screen", () => devices.getDisplayMedia({ video: true, audio: false }));
    } catch (error) {
      throw new CameraError(
        error.name === "NotAllowedError" ? NOTHING_SHARED : `The screen is not shown: ${error.message}`,
        { cause: error },
      );
    }
  }

  stop() {
    this.#attempt += 1;
    for (const track of this.#stream?.getTracks() ?? []) {
      track.onended = null;
      track.stop();
    }
    this.#video.srcObject = this.#stream = this.kind = null;
  }

  /** The cameras there are. Their names are known only once one has been allowed. */
  async list() {
    const devices = (await navigator.mediaDevices?.enumerateDevices()) ?? [];
    return devices.filter(({ kind }) => kind === "videoinput");
  }

  async #show(kind, request) {
    this.stop(); // some phones lend one camera at a time
    const attempt = this.#attempt;
    try {
      const stream = await request();
      if (attempt !== this.#attempt) {
        for (const track of stream.getTracks()) track.stop();
        return false;
      }
      this.#stream = stream;
      this.kind = kind;
      this.#track.onended = () => {
        this.stop();
        this.#onEnded();
      };
      this.#video.srcObject = stream;
      await this.#video.play();
    } catch (error) {
      if (attempt !== this.#attempt) return false; // what nobody wants any more may fail as it likes
      this.stop();
      throw error;
    }
    return true;
  }
}

function needed(devices, call) {
  if (devices?.[call]) return devices;
  throw new CameraError(
    window.isSecureContext
      ? "This browser lends no moving pictures here. Drop a picture on the page instead."
      : "Browsers lend the camera only to pages at localhost, 127.0.0.1 or https. Pictures work here, too.",
  );
}

function explained(error) {
  const reasons = {
    NotAllowedError: "The browser refused the camera. Allow it for this page, beside its address, then start again.",
    NotFoundError: "No camera was found. Connect one, or drop a picture on the page.",
    NotReadableError: "The camera is in use by another program. Close that program, then start again.",
    AbortError: "The camera did not start. Try again.",
  };
  return new CameraError(reasons[error.name] ?? `The camera did not start: ${error.message}`, { cause: error });
}
