// Runs on the audio thread: hands on what the microphone hears, in parts of 2,048 samples.
class Recorder extends AudioWorkletProcessor {
  part = new Float32Array(2048);
  filled = 0;

  process(inputs) {
    const heard = inputs[0][0];
    if (!heard) return true;
    this.part.set(heard, this.filled);
    this.filled += heard.length;
    if (this.filled === this.part.length) {
      this.port.postMessage(this.part.slice());
      this.filled = 0;
    }
    return true;
  }
}
registerProcessor("recorder", Recorder);
