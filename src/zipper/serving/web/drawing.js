// Pictures on canvases: a wave, a spectrogram, who looked at what; and the model as SVG.

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A canvas as sharp as the screen; returns its context and its size in CSS pixels. */
function ready(canvas, height) {
  const width = canvas.parentElement.clientWidth || 600;
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  return { pen, width, height };
}

/** Space for names at the left of pictures over time, which lie one below the other. */
export const gutterOf = (canvas) => (canvas.parentElement.clientWidth < 560 ? 58 : 88);

/** The loudest of the samples, column by column. at: a place that is played, 0 to 1. spans: words,
 * {from, to, lit}. about: stands at the left. */
export function wave(canvas, samples, { at = 0, spans = [], about = "" } = {}) {
  const { pen, width: whole, height } = ready(canvas, 96);
  const middle = height / 2, gutter = gutterOf(canvas), width = whole - gutter;
  pen.fillStyle = css("--quiet");
  pen.font = "13px system-ui, sans-serif";
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  pen.fillText(about, gutter - 10, middle);
  pen.translate(gutter, 0);
  const columns = Math.floor(width / 3), peaks = new Float32Array(columns);
  for (let i = 0; i < samples.length; i++) {
    const column = Math.floor((i * columns) / samples.length);
    peaks[column] = Math.max(peaks[column], Math.abs(samples[i]));
  }
  const loud = peaks.reduce((most, x) => Math.max(most, x), 1e-4);
  for (const span of spans) {
    pen.fillStyle = css("--lit");
    pen.globalAlpha = span.lit ? 0.75 : 0.16;
    pen.fillRect(span.from * width, 0, Math.max(1, (span.to - span.from) * width - 2), height);
  }
  pen.globalAlpha = 1;
  for (let column = 0; column < columns; column++) {
    const size = Math.max(1, (peaks[column] / loud) * (middle - 8));
    pen.fillStyle = column / columns < at ? css("--accent") : css("--quiet");
    pen.globalAlpha = column / columns < at ? 1 : 0.55;
    pen.fillRect(column * 3, middle - size, 2, 2 * size);
  }
  pen.globalAlpha = 1;
  if (at > 0) {
    pen.fillStyle = css("--ink");
    pen.fillRect(at * width, 0, 1.5, height);
  }
}

const WARM = [[11, 10, 20], [58, 18, 92], [137, 34, 106], [208, 65, 71], [249, 142, 50], [252, 233, 164]];

/** A colour of a row of colours, for a value from 0 to 1. */
function warm(value) {
  const place = Math.max(0, Math.min(0.9999, value)) * (WARM.length - 1);
  const low = Math.floor(place), share = place - low;
  return WARM[low].map((x, i) => Math.round(x + (WARM[low + 1][i] - x) * share));
}

/** Power of 256 frequencies, in place of a library: radix-2 on 512 samples. */
function power(frame) {
  const n = frame.length, re = Float32Array.from(frame), im = new Float32Array(n);
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) [re[i], re[j]] = [re[j], re[i]];
  }
  for (let size = 2; size <= n; size *= 2) {
    const turn = (-2 * Math.PI) / size;
    for (let start = 0; start < n; start += size) {
      for (let k = 0; k < size / 2; k++) {
        const c = Math.cos(turn * k), s = Math.sin(turn * k);
        const a = start + k, b = a + size / 2;
        const x = re[b] * c - im[b] * s, y = re[b] * s + im[b] * c;
        re[b] = re[a] - x, im[b] = im[a] - y, re[a] += x, im[a] += y;
      }
    }
  }
  return re.subarray(0, n / 2).map((x, i) => x * x + im[i] * im[i]);
}

/** Frequencies up to half the rate over time; more samples may be added while it is shown. */
export class Spectrogram {
  constructor(canvas, rate) {
    this.canvas = canvas;
    this.rate = rate;
    this.window = Float32Array.from({ length: 512 }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / 512));
    this.clear();
  }

  clear() {
    this.samples = new Float32Array(0);
    this.columns = [];
    this.least = 2; // seconds, while more may come
  }

  add(part) {
    const all = new Float32Array(this.samples.length + part.length);
    all.set(this.samples), all.set(part, this.samples.length);
    this.samples = all;
    const hop = 128;
    while (this.columns.length * hop + 512 <= all.length) {
      const at = this.columns.length * hop;
      this.columns.push(power(all.subarray(at, at + 512).map((x, i) => x * this.window[i])));
    }
    this.draw();
  }

  whole() {
    this.least = 0;
    this.draw();
  }

  draw() {
    const { pen, width, height } = ready(this.canvas, 220);
    const seconds = Math.max(this.least, this.samples.length / this.rate);
    const count = Math.max(1, Math.round((seconds * this.rate) / 128));
    const image = new ImageData(count, 200);
    for (let x = 0; x < count; x++) {
      for (let y = 0; y < 200; y++) {
        const column = this.columns[x];
        // finer below, as an ear has it
        const place = 255 * ((1 - y / 200) ** 1.5);
        const level = column ? (Math.log10(column[Math.floor(place)] + 1e-9) + 4.5) / 6.5 : 0;
        image.data.set([...warm(level), 255], 4 * (y * count + x));
      }
    }
    const small = new OffscreenCanvas(count, 200);
    small.getContext("2d").putImageData(image, 0, 0);
    pen.imageSmoothingQuality = "high";
    pen.drawImage(small, 0, 0, width, height - 20);
    pen.fillStyle = "#b9b4c9";
    pen.font = "11px system-ui, sans-serif";
    for (let s = 0; s < seconds; s += seconds > 8 ? 2 : 0.5) {
      pen.fillText(`${s.toFixed(1)} s`, (s / seconds) * width + 4, height - 6);
      pen.fillRect((s / seconds) * width, height - 20, 1, 5);
    }
  }
}

/** The rows of a picture of attention, from two bytes a weight in base64. */
export function rowsOf(look) {
  const raw = Uint8Array.from(atob(look.weights), (c) => c.charCodeAt(0));
  const [rows, columns] = look.shape, view = new DataView(raw.buffer);
  return Array.from({ length: rows }, (_, r) =>
    Float32Array.from({ length: columns }, (_, c) => view.getUint16(2 * (r * columns + c), true)));
}

/**
 * Who looked at what. rows: of weights. left: names of rows; below: names of columns. time: of
 * columns, {from, to, whole} in seconds, so that it lies under a wave. at: a place in it, 0 to 1.
 */
export function attention(canvas, { rows, left, below, time, at }) {
  const gutter = left ? gutterOf(canvas) : 0, foot = below || time ? 26 : 8;
  const line = left ? Math.max(15, Math.min(22, 360 / rows.length)) : Math.max(2, Math.min(8, 320 / rows.length));
  const { pen, width, height } = ready(canvas, Math.round(rows.length * line + foot));
  const wide = width - gutter, whole = time ? time.whole : 1;
  const x0 = time ? (time.from / whole) * wide : 0;
  const x1 = time ? (time.to / whole) * wide : wide;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const count = rows[0].length;
  const image = new ImageData(count, rows.length);
  rows.forEach((row, y) => {
    const most = row.reduce((a, b) => Math.max(a, b), 1);
    row.forEach((weight, x) => {
      const share = Math.sqrt(weight / most);
      const tone = dark ? [122, 179, 234] : [36, 96, 167];
      image.data.set([...tone, Math.round(255 * share)], 4 * (y * count + x));
    });
  });
  const small = new OffscreenCanvas(count, rows.length);
  small.getContext("2d").putImageData(image, 0, 0);
  pen.imageSmoothingEnabled = false;
  pen.fillStyle = css("--paper");
  pen.fillRect(gutter, 0, wide, rows.length * line);
  pen.drawImage(small, gutter + x0, 0, x1 - x0, rows.length * line);
  pen.fillStyle = css("--ink");
  pen.font = `${Math.min(13, line - 2)}px system-ui, sans-serif`;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  left?.forEach((name, i) => pen.fillText(name.trim() || "␣", gutter - 10, (i + 0.5) * line, gutter - 12));
  pen.textAlign = "left";
  pen.fillStyle = css("--quiet");
  pen.font = "11px system-ui, sans-serif";
  const floor = rows.length * line + 14;
  if (time) {
    const step = whole > 12 ? 2 : whole > 4 ? 1 : 0.5;
    for (let s = 0; s < whole; s += step) pen.fillText(`${s.toFixed(1)} s`, gutter + (s / whole) * wide + 2, floor);
  } else if (below) {
    const most = Math.floor(wide / 34), each = Math.max(1, Math.ceil(below.length / most));
    below.forEach((name, i) => {
      if (i % each === 0) pen.fillText(name.trim() || "␣", gutter + (i / count) * wide + 2, floor, wide / Math.min(most, count));
    });
  }
  if (at > 0 && time) {
    pen.fillStyle = css("--ink");
    pen.fillRect(gutter + at * wide, 0, 1.5, rows.length * line);
  }
}

/** Lines of a signal over time, one row a channel. */
export function lines(canvas, { names, rows }) {
  const shown = names.slice(0, 12), each = 54;
  const { pen, width } = ready(canvas, each * shown.length + 6);
  shown.forEach((name, c) => {
    const values = rows.map((row) => row[c]);
    const low = Math.min(...values), high = Math.max(...values), top = c * each + 16;
    pen.strokeStyle = css(`--c${c % 6}`);
    pen.lineWidth = 1.6;
    pen.beginPath();
    values.forEach((v, i) => {
      const x = (i / Math.max(1, values.length - 1)) * width;
      pen.lineTo(x, top + (1 - (v - low) / (high - low || 1)) * (each - 24));
    });
    pen.stroke();
    pen.fillStyle = css("--quiet");
    pen.font = "11px system-ui, sans-serif";
    pen.fillText(`${name}   ${low.toPrecision(3)} to ${high.toPrecision(3)}`, 2, c * each + 11);
  });
}

/** Towers side by side, blocks from below to above, and an arrow for every link. */
export function model(place, { towers, links }, tone) {
  const names = Object.keys(towers), most = Math.max(...names.map((n) => towers[n].blocks));
  const gap = Math.max(150, Math.min(300, 640 / names.length)), block = 92;
  const step = Math.max(20, Math.min(54, 300 / (most + 1))), top = 8, floor = top + (most + 1) * step;
  const width = gap * (names.length - 1) + 200, height = floor + 46;
  const x = (name) => 100 + gap * names.indexOf(name);
  const y = (depth) => floor - (depth + 0.5) * step;
  const out = [`<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="Towers and the links between them">`];
  names.forEach((name, i) => out.push(
    `<marker id="tip${i}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="11" markerHeight="11" markerUnits="userSpaceOnUse" orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="${tone(name)}"/></marker>`));
  for (const name of names) {
    const t = towers[name], left = x(name) - block / 2;
    for (let i = 1; i <= t.blocks; i++) {
      out.push(`<rect x="${left}" y="${y(i) + 3}" width="${block}" height="${step - 7}" rx="6" fill="${tone(name)}" fill-opacity="${t.trained ? 0.28 : 0.1}" stroke="${tone(name)}" stroke-width="1.2"${t.trained ? "" : ' stroke-dasharray="3 3"'}/>`);
    }
    out.push(`<text x="${x(name)}" y="${y(t.blocks) - 12}" text-anchor="middle" class="soft">logits</text>`);
    out.push(`<text x="${x(name)}" y="${floor - 2}" text-anchor="middle" class="soft">embeddings</text>`);
    out.push(`<text x="${x(name)}" y="${floor + 24}" text-anchor="middle" class="name">${escaped(name)}</text>`);
    out.push(`<text x="${x(name)}" y="${floor + 40}" text-anchor="middle" class="soft">${t.trained ? "trained" : "frozen"}</text>`);
  }
  for (const [key, link] of Object.entries(links)) {
    const [source, target] = key.split(":")[1].split(">");
    const right = x(target) > x(source) ? 1 : -1;
    const from = x(source) + (right * block) / 2 + right * 3, to = x(target) - (right * block) / 2 - right * 5;
    const up = y(link.shown) - (right > 0 ? 4 : -4), down = y(link.fused) - (right > 0 ? 4 : -4);
    const size = 1 + 4 * Math.abs(link.attention), bend = right * 40;
    // links between towers that are no neighbours go around those between
    const around = -right * 30 * (Math.abs(names.indexOf(target) - names.indexOf(source)) - 1);
    out.push(`<path d="M${from} ${up}C${from + bend} ${up + around} ${to - bend} ${down + around} ${to} ${down}" fill="none" stroke="${tone(source)}" stroke-width="${size.toFixed(1)}" stroke-opacity=".8" marker-end="url(#tip${names.indexOf(source)})"><title>${escaped(key)}: gates ${link.attention} and ${link.feedforward}</title></path>`);
  }
  place.innerHTML = `${out.join("")}</svg>`;
}

const escaped = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
