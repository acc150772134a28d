// Images and labels: NumPy's .npy files, and pixels of a canvas, as the model reads them.

/** The operator's images, or a picture that somebody chose, cannot be used. */
export class ImageError extends Error {
  name = "ImageError";
}

const SORTS = { "|u1": [Uint8Array, 1], "|i1": [Int8Array, 1], "<i8": [BigInt64Array, 8] };

/**
 * An array of a .npy file (format 1 to 3, C order): uint8, int8, int64 or text of fixed width.
 * @param {ArrayBuffer} buffer
 * @returns {{shape: number[], data: ArrayLike<number | string>}}
 */
export function readNpy(buffer) {
  const view = new DataView(buffer);
  const magic = [0x93, ...new TextEncoder().encode("NUMPY")];
  if (buffer.byteLength < 12 || magic.some((byte, i) => view.getUint8(i) !== byte)) {
    throw new ImageError("this is no .npy file");
  }
  const long = view.getUint8(6) > 1;
  const start = long ? 12 : 10;
  const end = start + (long ? view.getUint32(8, true) : view.getUint16(8, true));
  const head = new TextDecoder().decode(buffer.slice(start, end));
  const found = /'descr': '([^']+)', 'fortran_order': False, 'shape': \(([0-9, ]*)\)/.exec(head);
  const shape = (found?.[2].match(/[0-9]+/g) ?? []).map(Number);
  const count = shape.reduce((product, axis) => product * axis, 1);
  const width = /^<U([1-9][0-9]?)$/.exec(found?.[1] ?? "");
  const [Sort, size] = SORTS[found?.[1]] ?? [Uint32Array, width ? 4 * Number(width[1]) : 0];
  if (!size || buffer.byteLength !== end + count * size) {
    throw new ImageError("this .npy file is cut, or holds none of uint8, int8, int64 and short texts in C order");
  }
  const data = new Sort(buffer.slice(end));
  if (!width) {
    return { shape, data: Sort === BigInt64Array ? Array.from(data, Number) : data };
  }
  const texts = Array.from({ length: count }, (_, i) => {
    const points = data.subarray((i * size) / 4, ((i + 1) * size) / 4);
    return String.fromCodePoint(...points.filter((point) => point > 0));
  });
  return { shape, data: texts };
}

/**
 * Images and labels that fit together, and names of classes: the operator's sample.
 * @param {{shape: number[], data: Uint8Array}} images [n, C, H, W], or [n, H, W] for one channel
 * @param {{shape: number[], data: ArrayLike<number>}} labels [n]
 * @param {{data: string[]} | null} classes
 */
export function makeSample(images, labels, classes) {
  const axes = images.shape.length === 3 ? [images.shape[0], 1, ...images.shape.slice(1)] : images.shape;
  if (!(images.data instanceof Uint8Array) || axes.length !== 4 || ![1, 3].includes(axes[1]) || !axes[0]) {
    throw new ImageError(`images are not uint8 [n, 1 or 3, height, width] but [${images.shape}]`);
  }
  if (labels.shape.length !== 1 || labels.shape[0] !== axes[0]) {
    throw new ImageError(`there are ${labels.shape[0]} labels for ${axes[0]} images`);
  }
  const [count, channels, height, width] = axes;
  const size = channels * height * width;
  return {
    count,
    shape: [channels, height, width],
    labels: Array.from(labels.data),
    classes: classes === null ? null : Array.from(classes.data),
    image: (i) => images.data.subarray(i * size, (i + 1) * size),
  };
}

/** Pixels 0 to 255 as the model reads them: float32, pixel / 255 (as `qdeploy run` does). */
export function toInput(pixels) {
  return Float32Array.from(pixels, (pixel) => pixel / 255);
}

/** Pixels [C, H, W] -> RGBA of a canvas. */
export function toRgba(pixels, [channels, height, width]) {
  const plane = height * width;
  const rgba = new ImageData(width, height);
  for (let i = 0; i < plane; i += 1) {
    for (let c = 0; c < 3; c += 1) {
      rgba.data[4 * i + c] = pixels[(channels === 1 ? 0 : c * plane) + i];
    }
    rgba.data[4 * i + 3] = 255;
  }
  return rgba;
}

/** RGBA of a canvas -> pixels [C, H, W]; one channel is the luma of ITU-R BT.601. */
export function fromRgba(rgba, [channels, height, width], inverted) {
  const plane = height * width;
  const pixels = new Uint8Array(channels * plane);
  for (let i = 0; i < plane; i += 1) {
    const [r, g, b] = rgba.data.subarray(4 * i, 4 * i + 3);
    const values = channels === 1 ? [Math.round(0.299 * r + 0.587 * g + 0.114 * b)] : [r, g, b];
    values.forEach((value, c) => (pixels[c * plane + i] = inverted ? 255 - value : value));
  }
  return pixels;
}
