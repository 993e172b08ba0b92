/**
 * The loop over a video: looks at its frames, and in continuous mode asks about the newest one that the gate lets pass,
 * and about the next when the answer has ended.
 */

import { FrameGate } from "./frame_gate.js";

const LOOK_MS = 100; // between two looks at least: more often costs power, and shows nothing

/** Events: "look", after each look at a frame; "run", when it begins or ends to ask. */
export class Live extends EventTarget {
  #video;
  #askAbout;
  #gate = new FrameGate();
  #watch = 0; // the number of the watch that is on; an older one ends at its next frame
  #lookedAt = 0;
  #isAsking = false;
  #ends = []; // when the last few answers ended since it runs, in milliseconds
  #isHeld = false;
  #question = 0; // the number of the question: an answer to an older one closes no gate

  /**
   * @param video whose frames are looked at.
   * @param askAbout `async () => answer` about what the video shows now, or null; takes the frame before it waits.
   */
  constructor(video, askAbout) {
    super();
    this.#video = video;
    this.#askAbout = askAbout;
  }

  /** Whether frames are asked about, one after another. */
  isRunning = false;
  /** Frames held back since it runs. */
  held = 0;

  /** Of the newest frame from the answered one, in percent, or null. */
  get difference() {
    return this.#gate.difference;
  }

  set threshold(percent) {
    this.#gate.threshold = percent;
  }

  /** Answers per second, or null before there are two. */
  get rate() {
    if (this.#ends.length < 2) return null;
    return (1000 * (this.#ends.length - 1)) / (this.#ends.at(-1) - this.#ends[0]);
  }

  /** Look at frames from now on. */
  watch() {
    this.forget();
    this.#watch += 1;
    this.#next(this.#watch);
  }

  unwatch() {
    this.stop();
    this.#watch += 1;
  }

  run() {
    this.held = 0;
    this.#ends = [];
    this.#setRunning(true);
    this.forget();
  }

  stop() {
    this.#setRunning(false);
  }

  /** Ask nothing until `forget`: the question is being changed. */
  hold() {
    this.#isHeld = true;
  }

  /** The next frame passes the gate: the question has changed, or the scene. */
  forget() {
    this.#isHeld = false;
    this.#question += 1;
    this.#gate.answered(null);
    this.#look(); // what stands still, as a screen may, has no next frame
  }

  /** Ask about what the video shows now, whatever the gate says. */
  async shoot() {
    this.#gate.look(this.#video);
    await this.#ask();
  }

  #next(watch) {
    const look = (now) => {
      if (watch !== this.#watch) return;
      if (now - this.#lookedAt >= LOOK_MS) this.#look();
      this.#next(watch);
    };
    // Without new frames, as in a window that nobody sees, nothing is asked.
    if (this.#video.requestVideoFrameCallback) this.#video.requestVideoFrameCallback(look);
    else setTimeout(() => requestAnimationFrame(look), LOOK_MS);
  }

  #look() {
    if (this.#video.videoWidth === 0) return;
    this.#lookedAt = performance.now();
    this.#gate.look(this.#video);
    if (this.isRunning && !this.#isAsking && !this.#isHeld) {
      if (this.#gate.isOpen) this.#ask();
      else this.held += 1;
    }
    this.dispatchEvent(new Event("look"));
  }

  async #ask() {
    const [frame, question] = [this.#gate.frame, this.#question];
    this.#isAsking = true;
    const answer = await this.#askAbout().finally(() => (this.#isAsking = false));
    this.#ends = [...this.#ends.slice(-9), performance.now()];
    this.#lookedAt = 0; // the next frame is looked at, however soon it comes
    if (answer === null) this.stop();
    else if (question !== this.#question) this.#look();
    else if (answer.finishReason !== "stopped") this.#gate.answered(frame);
  }

  #setRunning(isRunning) {
    if (this.isRunning === isRunning) return;
    this.isRunning = isRunning;
    this.dispatchEvent(new Event("run"));
  }
}
