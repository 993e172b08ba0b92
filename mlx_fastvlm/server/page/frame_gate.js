/** Whether a frame is worth a question: it is not, while it hardly differs from the one that was answered last. */

const SIDE = 32; // frames are compared as so many cells a side
const MOST_CHANGED = 0.05; // of the cells: something small that moves counts as much as a change of everything

/**
 * Compares frames. The difference of two is the mean over their most changed cells of how much red, green and blue
 * changed, from 0 (equal) to 100 (black became white).
 */
export class FrameGate {
  #context;
  #answered = null;
  #seen = null;

  /** Percent from which a frame passes; 0 lets all pass. */
  threshold = 0;
  /** Of the frame last looked at, in percent; null while there is nothing to compare it with. */
  difference = null;

  constructor() {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = SIDE;
    this.#context = canvas.getContext("2d", { willReadFrequently: true });
    this.#context.imageSmoothingQuality = "high"; // a cell is the mean of its pixels, not one of them: less noise
  }

  /** Compare what a video shows now with the answered frame. */
  look(video) {
    this.#context.drawImage(video, 0, 0, SIDE, SIDE);
    this.#seen = this.#context.getImageData(0, 0, SIDE, SIDE).data;
    this.difference = this.#answered && difference(this.#seen, this.#answered);
  }

  /** Whether the frame last looked at is worth a question. */
  get isOpen() {
    return this.difference === null || this.difference >= this.threshold;
  }

  /** The frame last looked at, for `answered`. */
  get frame() {
    return this.#seen;
  }

  /** Later frames are compared with this one, or, without one, pass. */
  answered(frame = null) {
    this.#answered = frame;
  }
}

function difference(one, other) {
  const cells = new Float32Array(SIDE * SIDE);
  for (let cell = 0; cell < cells.length; cell += 1) {
    for (let at = 4 * cell; at < 4 * cell + 3; at += 1) cells[cell] += Math.abs(one[at] - other[at]);
  }
  const most = cells.sort().slice(-Math.ceil(MOST_CHANGED * cells.length));
  return ((100 / (3 * 255)) * most.reduce((sum, value) => sum + value)) / most.length;
}
