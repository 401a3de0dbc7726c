// The page: what a person can do with the model that is served. All requests go to this server.

import * as draw from "./drawing.js";
import * as sound from "./sound.js";

const $ = (id) => document.getElementById(id);
const state = { about: null, running: null };

/** An element. */
function make(kind, fields = {}, ...inside) {
  const made = Object.assign(document.createElement(kind), fields);
  made.append(...inside);
  return made;
}

function tell(error) {
  $("told").textContent = error ? String(error.message ?? error) : "";
  $("told").hidden = !error;
  if (error) $("told").scrollIntoView({ block: "nearest" });
}

const tone = (name) => `var(--c${Object.keys(state.about.towers).indexOf(name) % 6})`;
const shape = (number, digits = 2) => Number(number).toFixed(digits);

// --- asking

async function ask(path, options) {
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `${answer.status} ${answer.statusText}`);
}

/** Runs a plan; told what comes while it is made. Returns what is told in the end. */
async function run(wanted, told, signal) {
  const body = JSON.stringify({ ...wanted, stream: true, explain: true });
  const headers = { "content-type": "application/json" };
  const answer = await ask("v1/run", { method: "POST", headers, body, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let there = "", done = null;
  for (;;) {
    const { value, done: over } = await reader.read();
    if (over) break;
    const lines = (there + value).split("\n\n");
    there = lines.pop();
    for (const line of lines) {
      const content = line.replace(/^data: /, "");
      if (content === "[DONE]") continue;
      const event = JSON.parse(content);
      if (event.error) throw new Error(event.error.message);
      if (event.type === "done") done = event;
      else told(event);
    }
  }
  if (!done) throw new Error("The answer ended before it was whole. Ask again.");
  return done;
}

/** One thing runs at a time on this page: what ran before is given up. */
async function alone(work) {
  state.running?.abort();
  const own = (state.running = new AbortController());
  tell(null);
  try {
    await work(own.signal);
  } catch (error) {
    if (!own.signal.aborted) tell(error);
  } finally {
    if (state.running === own) state.running = null;
  }
}

// --- tabs

const TABS = ["listen", "speak", "compose", "model"];

function open(name, focus) {
  for (const each of TABS) {
    const chosen = each === name;
    $(each).hidden = !chosen;
    $(`tab-${each}`).setAttribute("aria-selected", chosen);
    $(`tab-${each}`).tabIndex = chosen ? 0 : -1;
  }
  if (focus) $(`tab-${name}`).focus();
  scrollTo(0, 0);
  if (focus !== undefined) tell(null);
  history.replaceState(null, "", `#${name}`);
  window.dispatchEvent(new Event("resize")); // pictures know their width when they are seen
}

function tabs(shown) {
  for (const name of TABS) {
    $(`tab-${name}`).hidden = !shown.includes(name);
    $(`tab-${name}`).onclick = () => open(name, false);
  }
  $("tabs").onkeydown = (event) => {
    const at = shown.indexOf(document.activeElement.id.replace("tab-", ""));
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    open(shown.at(to % shown.length), true);
  };
  const wanted = location.hash.slice(1);
  open(shown.includes(wanted) ? wanted : shown[0]);
}

// --- a button that records

const length = (parts) => parts.reduce((sum, part) => sum + part.length, 0);

/** growing: told all samples so far and their rate, once a picture; heard: the wav in the end. */
function recorder(button, growing, heard) {
  const label = button.querySelector("b"), named = label.textContent;
  let live = null, parts = [];
  const paint = () => {
    if (!live) return;
    growing(parts, live.rate);
    requestAnimationFrame(paint);
  };
  button.onclick = async () => {
    if (live) {
      live.stop();
      const { rate } = live;
      live = null;
      button.setAttribute("aria-pressed", false);
      label.textContent = named;
      heard(sound.wav(sound.joined(parts), rate));
      return;
    }
    tell(null);
    parts = [];
    button.disabled = true; // until the microphone is there: a second one would stay open
    try {
      live = await sound.record((part) => parts.push(part));
      paint();
      button.setAttribute("aria-pressed", true);
      label.textContent = "Stop";
    } catch (error) {
      tell(`The microphone cannot be used: ${error.message}`);
    } finally {
      button.disabled = false;
    }
  };
}

// --- listen

function listen(from, to) {
  const heard = { samples: new Float32Array(0), seconds: 0, words: [], look: null };
  const player = $("heard");

  function paint() {
    if ($("listen").hidden) return;
    const whole = player.duration || heard.seconds || 1;
    const now = player.currentTime, started = !player.paused || now > 0;
    const spans = heard.words.filter((w) => w.start !== undefined).map((w) => ({
      from: w.start / whole, to: w.end / whole, lit: started && w.start <= now && now < w.end,
    }));
    draw.wave($("wave"), heard.samples,
      { at: started ? now / whole : 0, spans, about: heard.seconds ? `${shape(heard.seconds, 1)} s` : "" });
    [...$("words").children].forEach((one, i) => {
      const word = heard.words[i];
      one.classList.toggle("lit", Boolean(word && started && word.start <= now && now < word.end));
    });
    if (heard.look) {
      const time = { ...heard.look.time, whole };
      draw.attention($("heard-look").querySelector("canvas"),
        { ...heard.look, time, at: started ? now / whole : 0 });
    }
    if (!player.paused) requestAnimationFrame(paint);
  }

  function words(list) {
    $("words").replaceChildren(...list.flatMap((word, i) => {
      const known = $("words").children[i]?.textContent === word.word;
      const one = make("button", { type: "button", textContent: word.word, className: known ? "" : "fresh" });
      if (word.confidence !== undefined) {
        one.classList.toggle("unsure", word.confidence < 0.6);
        const when = word.start === undefined ? "" : `, ${shape(word.start)} to ${shape(word.end)} s`;
        one.title = `${shape(100 * word.confidence, 0)} % sure${when}`;
      }
      one.onclick = () => {
        if (word.start === undefined) return;
        player.currentTime = word.start;
        player.play();
      };
      return [one, " "];
    }));
  }

  const hear = (blob, name) => alone(async (signal) => {
    const began = performance.now();
    Object.assign(heard, { words: [], look: null, samples: new Float32Array(0), seconds: 0 });
    $("words").replaceChildren();
    $("heard-look").hidden = true;
    $("heard-facts").textContent = "Listening…";
    $("heard-about").textContent = name;
    player.src = URL.createObjectURL(blob);
    player.hidden = false;
    const found = await sound.decoded(blob);
    if (found) Object.assign(heard, { samples: found.samples, seconds: found.samples.length / found.rate });
    paint();
    let text = "", first = 0;
    try {
      const given = [{ tower: from, content: await sound.base64(blob) }];
      const done = await run({ given, outputs: [to] }, (part) => {
        first ||= performance.now() - began;
        text += part.content;
        words(text.split(/\s+/).filter(Boolean).map((word) => ({ word })));
      }, signal);
      const said = done.produced[0];
      heard.words = said.words ?? [];
      words(heard.words);
      const took = performance.now() - began;
      if (!heard.words.length) {
        $("words").replaceChildren(make("span", { className: "none", textContent: "Nothing was said." }));
        $("heard-facts").textContent = "";
        return;
      }
      const sure = Math.exp(said.score / Math.max(1, said.ids.length + said.ended));
      $("heard-facts").innerHTML = `<b>${shape(100 * sure, 0)} %</b> sure · first words after
        <b>${shape(first, 0)} ms</b> · all after <b>${shape(took, 0)} ms</b>`;
      const look = done.looks.find((one) => one.target === 1 && one.source === 0);
      if (look && done.clocks[0]) {
        const [start, step] = done.clocks[0];
        const time = { from: start, to: start + step * look.shape[1] };
        heard.look = { rows: draw.rowsOf(look), left: done.labels[1], time };
        $("heard-look").hidden = false;
      }
      paint();
    } catch (error) {
      $("heard-facts").textContent = "";
      throw error;
    }
  });

  recorder($("record"), (parts, rate) => {
    $("heard-about").textContent = `${shape(length(parts) / rate, 1)} s`;
    draw.wave($("wave"), sound.joined(parts.slice(-Math.round((8 * rate) / 2048)))); // the last 8 s
  }, (blob) => hear(blob, "recorded here"));
  $("file").onchange = () => {
    const [file] = $("file").files;
    if (file) hear(file, file.name);
    $("file").value = "";
  };
  const card = $("wave-box").parentElement;
  dropped(card, (file) => hear(file, file.name));
  $("wave").onclick = (event) => {
    if (!player.duration) return;
    const gutter = draw.gutterOf($("wave"));
    const share = (event.offsetX - gutter) / ($("wave").clientWidth - gutter);
    player.currentTime = Math.max(0, share) * player.duration;
    paint();
  };
  for (const event of ["play", "seeked", "pause", "ended", "loadedmetadata"]) {
    player.addEventListener(event, paint);
  }
  window.addEventListener("resize", paint);
  paint();
}

/** Files that are dropped on an element. */
function dropped(place, taken) {
  place.ondragover = (event) => {
    event.preventDefault();
    place.classList.add("over");
  };
  place.ondragleave = () => place.classList.remove("over");
  place.ondrop = (event) => {
    event.preventDefault();
    place.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) taken(file);
  };
}

// --- speak

function speak(from, to) {
  const voices = state.about.towers[to].prefixes;
  const names = ["any voice", ...Object.keys(voices)];
  $("voices").append(...names.map((name, i) => make("label", {},
    make("input", { type: "radio", name: "voice", value: name, className: "hidden", checked: i === 0 }),
    make("span", { textContent: name }))));
  $("voices").hidden = names.length < 2;
  let player = null, picture = null, look = null;

  const paint = () => {
    if ($("speak").hidden) return;
    picture?.draw();
    if (look) draw.attention($("said-look").querySelector("canvas"), look);
  };
  window.addEventListener("resize", paint);

  $("speak-form").onsubmit = (event) => {
    event.preventDefault();
    player?.stop();
    alone(async (signal) => {
      const began = performance.now();
      const voice = document.querySelector("input[name=voice]:checked").value;
      const content = voices[voice] === undefined ? [] : [voices[voice]];
      const given = [{ tower: from, content: $("say").value }];
      $("speak-go").disabled = true;
      $("said-look").hidden = $("said").hidden = true;
      $("said-facts").textContent = "…";
      look = null;
      let first = 0;
      player = null;
      await sound.context().resume();
      try {
        const done = await run({ given, outputs: [{ tower: to, content }] }, (part) => {
          if (!part.media_type?.startsWith("audio/pcm")) return;
          const rate = Number(/rate=(\d+)/.exec(part.media_type)?.[1] ?? 16000);
          if (!player) {
            first = performance.now() - began;
            player = new sound.Player(rate);
            $("said-card").hidden = false;
            picture = new draw.Spectrogram($("spectrogram"), rate);
          }
          const samples = sound.samplesOf(part.content);
          player.add(samples);
          picture.add(samples);
        }, signal);
        const [said] = done.produced;
        if (!said.content) throw new Error("The model said nothing to that.");
        const took = performance.now() - began;
        const file = new Blob([sound.bytes(said.content)], { type: said.media_type });
        $("said").src = URL.createObjectURL(file);
        $("said").hidden = false;
        picture?.whole();
        $("said-facts").innerHTML = `first sound after <b>${shape(first, 0)} ms</b> ·
          <b>${shape(said.seconds)} s</b> of sound in ${shape(took / 1000)} s`;
        const found = done.looks.find((one) => one.target === 1 && one.source === 0);
        if (found) {
          look = turned(found, done.labels[0], said.seconds);
          $("said-look").hidden = false;
          paint();
        }
      } catch (error) {
        $("said-facts").textContent = "";
        throw error;
      } finally {
        $("speak-go").disabled = false;
      }
    });
  };
  $("say").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      $("speak-form").requestSubmit();
    }
  };
}

/** A picture of what sound looked at, with time from left to right: rows become columns. */
function turned(look, names, seconds) {
  const rows = draw.rowsOf(look);
  const columns = rows[0].length;
  const flipped = Array.from({ length: columns }, (_, c) => Float32Array.from(rows, (row) => row[c]));
  return { rows: byColumn(flipped), left: names, time: { from: 0, to: seconds, whole: seconds } };
}

/** Each moment by its own measure, so that a row that is always looked at hides nothing. */
function byColumn(rows) {
  return rows.map((row) => row.map((weight, c) => {
    const most = rows.reduce((found, one) => Math.max(found, one[c]), 1);
    return (65535 * weight) / most;
  }));
}

// --- compose

function compose() {
  const towers = state.about.towers, names = Object.keys(towers);
  const segments = [];

  function add(tower, focus) {
    const segment = { tower, content: towers[tower].suffix ? null : "" };
    const about = make("span", { className: "quiet grow" });
    const remove = make("button", { type: "button", className: "icon", textContent: "✕" });
    remove.setAttribute("aria-label", `Remove this ${tower}`);
    const body = towers[tower].suffix ? filed(segment, about) : typed(segment);
    segment.card = card(tower, [about, remove], body);
    remove.onclick = () => {
      segments.splice(segments.indexOf(segment), 1);
      segment.card.remove();
    };
    segments.push(segment);
    $("given").append(segment.card);
    if (focus) segment.card.querySelector("textarea, input, button:not(.icon)")?.focus();
  }

  function typed(segment) {
    const area = make("textarea", { rows: 1, placeholder: towers[segment.tower].like, spellcheck: false });
    area.setAttribute("aria-label", `Content of this ${segment.tower}`);
    area.oninput = () => (segment.content = area.value);
    return [area];
  }

  /** A segment that is a file: chosen, dropped or, where it is sound, recorded. */
  function filed(segment, about) {
    const { suffix } = towers[segment.tower];
    const shown = make("div"), input = make("input", { type: "file", className: "hidden" });
    const label = make("label", { className: "button small", textContent: "Open a file" });
    label.htmlFor = input.id = `file-${segment.tower}-${performance.now()}`;
    const row = make("div", { className: "row wrap" }, label, input);
    const take = async (file) => {
      try {
        segment.content = await sound.base64(file);
        about.textContent = file.name ?? "recorded here";
        show(shown, suffix, file, suffix === ".csv" ? await file.text() : null);
      } catch (error) {
        tell(error);
      }
    };
    input.onchange = () => input.files[0] && take(input.files[0]);
    if (suffix === ".wav") {
      const button = make("button", { type: "button", className: "small" });
      button.append(make("span", { className: "dot" }), make("b", { textContent: "Record" }));
      recorder(button, (parts, rate) => {
        about.textContent = `${shape(length(parts) / rate, 1)} s`;
      }, take);
      row.prepend(button);
    }
    dropped(shown, take);
    return [row, shown];
  }

  for (const name of names) {
    const button = make("button", { type: "button", className: "small", textContent: `+ ${name}` });
    button.onclick = () => add(name, true);
    $("add").append(button);
  }
  chips(names);
  const text = names.find((name) => !towers[name].suffix);
  add(text ?? names[0], false);
  const other = names.find((name) => name !== (text ?? names[0])) ?? names[0];
  $("plan").value = other;
  if (text) {
    const area = $("given").querySelector("textarea");
    area.value = segments[0].content = towers[text].kind === "text" ? $("say").value : "";
  }
  $("stop").onclick = () => state.running?.abort();
  $("compose-form").onsubmit = (event) => {
    event.preventDefault();
    alone((signal) => produce(segments, signal));
  };
}

/** A series from CSV, to be drawn; what it means the server says. */
function series(text) {
  const [head, ...rows] = text.trim().split(/\r?\n/).map((line) => line.split(","));
  const numbers = rows.map((row) => row.map(Number));
  const time = head.findIndex((name) => /^time\s*(\[s\])?$/i.test(name.trim()));
  if (!numbers.length || numbers.flat().some(Number.isNaN)) {
    throw new Error("This is no table of numbers with a line of names above them.");
  }
  const kept = head.map((_, i) => i).filter((i) => i !== time);
  return {
    values: numbers.map((row) => kept.map((i) => row[i])),
    channels: kept.map((i) => head[i].replace(/\[.*\]\s*$/, "").trim()),
  };
}

function chips(names) {
  const put = (words) => {
    const plan = $("plan"), glue = /[,+]\s*$/.test(plan.value) || !plan.value.trim() ? "" : ", ";
    plan.value = /^[,+]/.test(words) ? `${plan.value.trimEnd()} ${words} ` : plan.value + glue + words;
    plan.focus();
  };
  const voiced = names.flatMap((name) =>
    Object.keys(state.about.towers[name].prefixes).map((voice) => `${name}(${voice})`));
  for (const words of [...names, ...voiced, "+", "*"]) {
    const chip = make("button", { type: "button", className: "small", textContent: words });
    chip.setAttribute("aria-label", `Put ${words} into the plan`);
    chip.onclick = () => put(words);
    $("chips").append(chip);
  }
  const clear = make("button", { type: "button", className: "small icon", textContent: "clear" });
  clear.onclick = () => {
    $("plan").value = "";
    $("plan").focus();
  };
  $("chips").append(clear);
}

/** The outputs of a plan; "speech(low)" begins with what stands for that voice. */
function outputs(plan) {
  return plan.split(",").map((item) => item.trim()).filter(Boolean).map((item) => {
    const voice = /^([^()+]+)\(([^()]+)\)$/.exec(item);
    if (!voice) return item;
    const [, tower, name] = voice.map((part) => part.trim());
    const id = state.about.towers[tower]?.prefixes[name];
    if (id === undefined) throw new Error(`${tower} has no ${name}.`);
    return { tower, content: [id] };
  });
}

async function produce(segments, signal) {
  const empty = segments.find((segment) => segment.content === null);
  if (empty) throw new Error(`A given segment of ${empty.tower} has no file yet. Open one, or remove it.`);
  const given = segments.map(({ tower, content }) => ({ tower, content }));
  const wanted = { given, outputs: outputs($("plan").value), seed: Number($("seed").value) };
  if (!wanted.outputs.length) throw new Error("Say what is to be produced.");
  const names = ["temperature", "top_k", "top_p", "guidance"];
  wanted.sampling = Object.fromEntries(names.map((name) => [name, Number($(name).value)]));
  const most = Number($("limit").value);
  if (most) {
    const plan = $("plan").value; // a choice may fall on any tower
    const named = Object.keys(state.about.towers).filter((name) => plan.includes("*") || plan.includes(name));
    wanted.limits = Object.fromEntries(named.map((name) => [name, most]));
  }
  $("produced").replaceChildren();
  $("run").disabled = true;
  $("stop").disabled = false;
  const cards = new Map();
  try {
    await sound.context().resume();
    const done = await run(wanted, (part) => {
      if (!cards.has(part.segment)) cards.set(part.segment, growing(part.tower));
      cards.get(part.segment).add(part);
    }, signal);
    done.produced.forEach((made, i) => {
      if (!cards.has(i)) cards.set(i, growing(made.tower));
      const towers = given.map((one) => one.tower);
      cards.get(i).finish(made, { ...done, given: towers }, given.length + i);
    });
    $("produced").append(...[...cards].sort(([a], [b]) => a - b).map(([, one]) => one.card));
  } finally {
    $("run").disabled = false;
    $("stop").disabled = true;
  }
}

/** A card that fills while its segment is made. */
function growing(tower) {
  const { suffix } = state.about.towers[tower];
  const about = make("span", { className: "quiet grow" }), body = make("div");
  const one = card(tower, [about], [body]);
  if (!suffix) body.className = "text";
  $("produced").append(one);
  let player = null, picture = null;
  return {
    card: one,
    add(part) {
      if (part.media_type?.startsWith("audio/pcm")) {
        const rate = Number(/rate=(\d+)/.exec(part.media_type)?.[1] ?? 16000);
        if (!player) {
          player = new sound.Player(rate);
          const canvas = make("canvas");
          body.append(make("div", { className: "picture night" }, canvas));
          picture = new draw.Spectrogram(canvas, rate);
        }
        const samples = sound.samplesOf(part.content);
        player.add(samples);
        picture.add(samples);
      } else if (!suffix) {
        body.textContent += part.content;
      }
    },
    finish(made, done, number) {
      const why = made.ended ? "" : " · cut off at its limit";
      about.textContent = `${made.ids.length} token${made.ids.length === 1 ? "" : "s"}${why}`;
      picture?.whole();
      if (!suffix) body.textContent = made.content || "(nothing)";
      else if (made.content === null) body.textContent = "(nothing)";
      else {
        const file = new Blob([sound.bytes(made.content)], { type: made.media_type });
        show(body, suffix, file, suffix === ".csv" ? new TextDecoder().decode(sound.bytes(made.content)) : null, player);
      }
      const looks = done.looks.filter((each) => each.target === number);
      if (looks.length) one.append(looked(looks, done));
    },
  };
}

/** Pictures of what a segment looked at, one at a time. */
function looked(looks, done) {
  const given = done.labels.length - done.produced.length;
  const choice = make("select", {}, ...looks.map((look, i) => {
    const { source } = look, tower = source < given ? done.given[source] : done.produced[source - given].tower;
    const what = source < given ? `given ${source + 1}` : `produced ${source - given + 1}`;
    return make("option", { value: i, textContent: `${tower}, ${what}` });
  }));
  choice.setAttribute("aria-label", "Which segment it looked at");
  const canvas = make("canvas");
  const paint = () => {
    const look = looks[Number(choice.value)];
    const left = done.labels[look.target], below = done.labels[look.source];
    draw.attention(canvas, { rows: draw.rowsOf(look), left, below });
  };
  const what = make("details", { ontoggle: paint }, make("summary", { textContent: "What it looked at" }));
  choice.onchange = paint;
  choice.hidden = looks.length < 2;
  what.append(choice, make("div", { className: "picture" }, canvas));
  return what;
}

/** A file as people look at it. */
function show(place, suffix, file, content, player) {
  const url = URL.createObjectURL(file);
  if (suffix === ".wav") {
    const audio = make("audio", { controls: true, src: url });
    if (player) place.append(audio);
    else place.replaceChildren(audio);
  } else if (suffix === ".png") {
    place.replaceChildren(make("img", { src: url, alt: "A picture" }));
  } else if (suffix === ".csv") {
    const { channels, values } = series(content);
    const canvas = make("canvas");
    place.replaceChildren(make("div", { className: "picture" }, canvas));
    draw.lines(canvas, { names: channels, rows: values });
  } else {
    const link = make("a", { href: url, download: `made${suffix}`, textContent: "Save the file" });
    place.replaceChildren(link);
  }
}

function card(tower, head, body) {
  const named = make("b", { textContent: tower });
  const one = make("article", { className: "card segment" }, make("header", {}, named, ...head), ...body);
  one.style.setProperty("--tone", tone(tower));
  return one;
}

// --- the model

function about() {
  const { towers, links, parameters, new_parameters: added, trained_parameters: trained } = state.about;
  const many = (n) => (n >= 1e6 ? `${shape(n / 1e6, 1)} million` : n.toLocaleString("en"));
  $("model-lead").textContent = `${Object.keys(towers).length} towers of ${many(parameters)} parameters in
    all; zipping added ${many(added)}, and ${many(trained)} were trained.`;
  draw.model($("model-picture"), state.about, tone);
  for (const [name, tower] of Object.entries(towers)) {
    const facts = {
      kind: tower.kind,
      decoder: `${tower.family}, ${tower.blocks} blocks of width ${tower.width}`,
      vocabulary: `${tower.vocabulary} ids`,
      parameters: many(tower.parameters),
      ...tower.about,
    };
    const list = make("dl");
    for (const [key, value] of Object.entries(facts)) {
      list.append(make("dt", { textContent: key }), make("dd", { textContent: value }));
    }
    const tag = make("span", { className: "tag", textContent: tower.trained ? "trained" : "frozen" });
    const one = make("div", { className: "card segment" },
      make("div", { className: "tower-name" }, name, tag), list);
    one.style.setProperty("--tone", tone(name));
    if (tower.digest_now) {
      const same = tower.digest_now === tower.digest;
      const proof = make("div", { className: `proof ${same ? "good" : "bad"}` });
      proof.append(make("b", { textContent: same ? "✓" : "✗" }));
      const said = same ? "Its weights here and now have the hash that it had before it was zipped: "
        : "Its weights are not what they were before it was zipped: ";
      const digest = make("code", { textContent: tower.digest_now.slice(0, 24), title: tower.digest_now });
      proof.append(make("span", {}, said, digest));
      one.append(proof);
    }
    $("towers").append(one);
  }
  const head = make("tr", {}, ...["link", "attention gate", "feed-forward gate", "shown after block", "fused after block"]
    .map((name) => make("th", { textContent: name, scope: "col" })));
  $("links").append(make("thead", {}, head));
  const gate = (value) => (value === null ? make("td", { textContent: "none" })
    : make("td", {}, bar(Math.abs(value)), shape(value, 3)));
  const rows = Object.entries(links).map(([key, link]) => make("tr", {},
    make("th", { textContent: key.split(":")[1].replace(">", " → "), scope: "row" }),
    gate(link.attention), gate(link.feedforward),
    make("td", { textContent: link.shown || "embeddings" }), make("td", { textContent: link.fused })));
  $("links").append(make("tbody", {}, ...rows));
}

/** A share from 0 to 1 as a bar. */
function bar(share) {
  const filled = make("i");
  filled.style.width = `${100 * Math.min(1, share)}%`;
  return make("span", { className: "bar-of" }, filled);
}

// --- begin

async function begin() {
  const [{ id }] = (await (await ask("v1/models")).json()).data;
  $("name").textContent = id;
  $("name").title = id;
  document.title = `${id} · Zipper`;
  state.about = await (await ask(`v1/models/${encodeURIComponent(id)}`)).json();
  const towers = Object.entries(state.about.towers);
  const heard = towers.find(([, tower]) => tower.suffix === ".wav")?.[0];
  const text = towers.find(([, tower]) => tower.kind === "text")?.[0];
  const both = heard && text;
  compose();
  about();
  if (both) listen(heard, text), speak(text, heard);
  tabs(both ? TABS : ["compose", "model"]);
  document.body.dataset.ready = "yes";
}

begin().catch(tell);
