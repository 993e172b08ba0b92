/**
 * Pictures on their way to the server: frames of a video and files of the user, no larger than the model sees them.
 *
 * A picture has a `name`, a `thumbnail` (data: URL, or null if the browser cannot show it), a `preview` (URL to show it
 * by, or null) and `dataUrl(view)`, which is what is sent. A view is what the model is to see: `{resolution, fit}`, as
 * the server takes them, and `largest`, the most pixels a side that this may come to.
 */

const SENT_AS_IT_IS = /^image\/(jpeg|png|webp|gif|bmp)$/; // of other types a copy is sent, if the browser can make one
const UNTYPED = /\.hei[cf]$/i; // most systems know no type for them
const SENT_BYTES = 1.5 * 2 ** 20; // eight such files fit into one request
const SENT_PIXELS = 2 ** 24; // a small file can hold many, which take the server as long as those of a large one
const FRAME_QUALITY = 0.92;
const COPY_QUALITY = 0.95;
const THUMBNAIL_SIDE = 160;

/** A view's resolution in words. */
export function resolutionText(resolution) {
  return resolution === "auto" ? "auto resolution" : `${resolution} px`;
}

/** What a video shows now. */
export function frameOf(video, view, name) {
  const canvas = scaled(video, video.videoWidth, video.videoHeight, view);
  const sent = toBlob(canvas, FRAME_QUALITY).then(toDataUrl);
  return { name, thumbnail: thumbnailOf(canvas, canvas.width, canvas.height), preview: null, dataUrl: () => sent };
}

/** A file that the user chose, dropped or pasted. One that the browser cannot decode goes to the server as it is. */
export async function pictureOf(file) {
  const preview = URL.createObjectURL(file);
  const image = await decoded(preview);
  if (image === null) URL.revokeObjectURL(preview);
  const isSentAsItIs = image === null || (SENT_AS_IT_IS.test(file.type) && isSmall(file, image));
  const sent = new Map(); // by what makes a difference
  const dataUrl = (view) => {
    const kind = isSentAsItIs ? "original" : `${view.largest} ${view.fit}`;
    if (!sent.has(kind)) sent.set(kind, isSentAsItIs ? toDataUrl(file) : copyOf(image, view));
    return sent.get(kind);
  };
  return {
    name: file.name || "Pasted picture",
    thumbnail: image && thumbnailOf(image, image.naturalWidth, image.naturalHeight),
    preview: image && preview,
    dataUrl,
  };
}

/** The pictures among what was dropped or pasted: images, and what might be one that only the server knows. */
export function picturesIn(transfer) {
  const isPicture = ({ type, name }) => /^image\/|^application\/pdf$/.test(type) || UNTYPED.test(name);
  return [...(transfer?.files ?? [])].filter(isPicture);
}

function isSmall(file, image) {
  return file.size <= SENT_BYTES && image.naturalWidth * image.naturalHeight <= SENT_PIXELS;
}

async function decoded(url) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode(); // upright: the browser follows the orientation that the file notes
    return image;
  } catch {
    return null;
  }
}

function copyOf(image, view) {
  return toBlob(scaled(image, image.naturalWidth, image.naturalHeight, view), COPY_QUALITY).then(toDataUrl);
}

function thumbnailOf(source, width, height) {
  return scaled(source, width, height, { largest: THUMBNAIL_SIDE, fit: "pad" }).toDataURL("image/jpeg", 0.8);
}

/** A canvas with the picture, no larger than the view needs; the transparent becomes white, as at the server. */
function scaled(source, width, height, { largest, fit }) {
  const fitted = { pad: Math.max(width, height), crop: Math.min(width, height), native: Math.sqrt(width * height) };
  const factor = Math.min(1, largest / fitted[fit]);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(factor * width));
  canvas.height = Math.max(1, Math.round(factor * height));
  const context = canvas.getContext("2d", { alpha: false });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas;
}

function toBlob(canvas, quality) {
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", quality));
}

function toDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The picture could not be read. Is the file still there?"));
    reader.readAsDataURL(blob);
  });
}
