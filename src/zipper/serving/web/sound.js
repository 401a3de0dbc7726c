// Sound in and out: the microphone, wav files, and a player for sound that is still being made.

export const context = () => (context.one ??= new AudioContext());

/** Begins to record. heard: told each part (Float32Array). Returns {rate, stop()}. */
export async function record(heard) {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
  const audio = context();
  await audio.resume();
  if (!record.ready) record.ready = audio.audioWorklet.addModule("recorder.js");
  await record.ready;
  const source = audio.createMediaStreamSource(stream);
  const node = new AudioWorkletNode(audio, "recorder", { numberOfOutputs: 0 });
  node.port.onmessage = (message) => heard(message.data);
  source.connect(node);
  return {
    rate: audio.sampleRate,
    stop() {
      source.disconnect();
      node.port.onmessage = null;
      for (const track of stream.getTracks()) track.stop();
    },
  };
}

export function joined(parts) {
  const all = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

/** Samples as a wav file of 16 bits, one channel. */
export function wav(samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const word = (at, letters) => [...letters].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  word(0, "RIFF"), view.setUint32(4, 36 + 2 * samples.length, true), word(8, "WAVEfmt ");
  view.setUint32(16, 16, true), view.setUint16(20, 1, true), view.setUint16(22, 1, true);
  view.setUint32(24, rate, true), view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true), view.setUint16(34, 16, true);
  word(36, "data"), view.setUint32(40, 2 * samples.length, true);
  samples.forEach((x, i) => view.setInt16(44 + 2 * i, 32767 * Math.max(-1, Math.min(1, x)), true));
  return new Blob([view], { type: "audio/wav" });
}

/** Samples of 16 bits in base64. */
export function samplesOf(base64) {
  const whole = new Int16Array(bytes(base64).buffer);
  return Float32Array.from(whole, (x) => x / 32768);
}

export const bytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));

export async function base64(blob) {
  const content = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let at = 0; at < content.length; at += 32768) {
    text += String.fromCharCode(...content.subarray(at, at + 32768));
  }
  return btoa(text);
}

/** The samples of a file as far as this browser can decode it, else null. */
export async function decoded(blob) {
  try {
    const found = await context().decodeAudioData(await blob.arrayBuffer());
    return { samples: found.getChannelData(0), rate: found.sampleRate };
  } catch {
    return null;
  }
}

/** Plays parts one behind the other, each as soon as it comes. */
export class Player {
  constructor(rate) {
    this.rate = rate;
    this.parts = [];
    this.playing = [];
    this.next = 0;
  }

  add(samples) {
    this.parts.push(samples);
    const audio = context();
    if (audio.state !== "running") return; // the browser lets no page speak unasked
    const buffer = audio.createBuffer(1, samples.length, this.rate);
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(audio, { buffer });
    source.connect(audio.destination);
    this.next = Math.max(this.next, audio.currentTime + 0.05);
    source.start(this.next);
    this.next += buffer.duration;
    this.playing.push(source);
  }

  stop() {
    for (const source of this.playing) source.stop();
    this.playing = [];
  }

  get samples() {
    return joined(this.parts);
  }
}
