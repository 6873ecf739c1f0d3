// The page of `nf4 explore`. In the page it stands after nf4.mjs, in a block of its own.
const GRIDS = { nf4: 'NF4', int4: 'uniform (int4)', fp4: 'FP4 of bitsandbytes', 'fp4-e2m1': 'FP4 of OCP' };
const SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096];
const DRAWN = 16384; // weights of a distribution
const WIDTH = 940, MARGIN = 30, RADIUS = 8;
const by = (id) => document.getElementById(id);
const show = (v) => Number(v.toPrecision(6)).toString();

/** A generator of uniform numbers in (0, 1), the same for the same seed (mulberry32). */
function uniform(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
}
const normal = (u) => Math.sqrt(-2 * Math.log(u())) * Math.cos(2 * Math.PI * u());
const DISTRIBUTIONS = {
  normal: normal,
  uniform: (u) => 2 * u() - 1,
  Laplace: (u) => (u() < 0.5 ? 1 : -1) * -Math.log(u()),
  'Student t, 4 degrees (outliers)': (u) => normal(u) / Math.sqrt(-(Math.log(u()) + Math.log(u())) / 2),
};

const TENSORS = JSON.parse(by('tensors').textContent); // name -> base64 of float32, little end first
function tensor(name) {
  const bytes = Uint8Array.from(atob(TENSORS[name]), (c) => c.charCodeAt(0)), view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

const state = { grid: 'nf4', blockSize: 64, source: 'normal', seed: 1, double: false, block: 0, weight: 0 };
state.weights = new Float32Array(0);
window.explore = state; // for the console, and for tests

function load() {
  const u = uniform(state.seed), draw = DISTRIBUTIONS[state.source];
  state.weights = draw ? Float32Array.from({ length: DRAWN }, () => draw(u)) : tensor(state.source);
  state.block = state.weight = 0;
}

/** All weights on one grid, by the port: codes, decoded values, the absmax of each block, and what it costs. */
function encodeAll(grid) {
  const { weights, blockSize } = state, n = weights.length;
  const layout = { shape: [n], dtype: 'float32', block_size: blockSize, codebook: grid };
  const plain = quantize(weights, layout);
  const stored = state.double ? quantize(weights, { ...layout, double_quant: true }) : plain;
  const decoded = dequantize(stored), absmax = stored.absmax ?? decode_absmax(stored);
  const code = (i) => (i % 2 ? stored.codes[(i - 1) / 2] & 15 : stored.codes[i / 2] >> 4);
  let square = 0, power = 0, largest = 0;
  weights.forEach((w, i) => {
    const error = Math.abs(w - decoded[i]);
    square += error * error; power += w * w; largest = Math.max(largest, error);
  });
  const bits = (8 * storage(n, blockSize, state.double)) / n;
  return { grid, code, decoded, absmax, plain: plain.absmax, stored, bits, mse: square / n,
    relative: power ? Math.sqrt(square / power) : 0, largest };
}

const SVG = 'http://www.w3.org/2000/svg';
function add(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

let reach = 1; // what the line shows to either side of 0; it stays while a weight is dragged
const toX = (v) => WIDTH / 2 + (v / reach) * (WIDTH / 2 - MARGIN);
const fromX = (x) => ((x - WIDTH / 2) / (WIDTH / 2 - MARGIN)) * reach;
const within = (v) => Math.fround(Math.max(-reach, Math.min(reach, v)));

function drawLine(all) {
  const svg = by('line'), { blockSize, block, weight, weights } = state, first = block * blockSize;
  const focused = document.activeElement?.classList.contains('handle');
  const { values, codes, thresholds } = codebook(all.grid), absmax = all.absmax[block];
  const kept = svg.querySelector('.handle');
  svg.replaceChildren();
  add(svg, 'line', { x1: 0, x2: WIDTH, y1: 120, y2: 120, stroke: '#bbb' });
  for (const t of thresholds) {
    add(svg, 'line', { class: 'edge', x1: toX(t * absmax), x2: toX(t * absmax), y1: 20, y2: 165 });
  }
  for (const code of codes) {
    const x = toX(values[code] * absmax);
    add(svg, 'line', { class: 'value', x1: x, x2: x, y1: 128, y2: 158 });
    add(svg, 'text', { x, y: 176, 'text-anchor': 'middle' }, code.toString(16));
  }
  const stop = Math.min(first + blockSize, weights.length);
  for (let i = first; i < stop; i += 1) {
    if (i - first !== weight) {
      const y = 30 + ((i * 37) % 83);
      const dot = add(svg, 'circle', { class: 'dot', cx: toX(weights[i]), cy: y, r: blockSize > 256 ? 2 : 4 });
      dot.addEventListener('pointerdown', () => { state.weight = i - first; update(); });
    }
  }
  const i = first + weight, at = toX(weights[i]), to = toX(all.decoded[i]);
  add(svg, 'line', { class: 'error', x1: at, x2: to, y1: 120, y2: 120 });
  const handle = kept ?? document.createElementNS(SVG, 'circle');
  if (!kept) {
    for (const [key, value] of Object.entries({ class: 'handle', r: RADIUS, cy: 120, tabindex: 0, role: 'slider' })) {
      handle.setAttribute(key, value);
    }
    handle.setAttribute('aria-label', 'the weight');
    handle.addEventListener('pointerdown', startDrag);
    handle.addEventListener('keydown', press);
  }
  handle.setAttribute('cx', at);
  handle.setAttribute('aria-valuemin', show(-reach));
  handle.setAttribute('aria-valuemax', show(reach));
  handle.setAttribute('aria-valuenow', show(weights[i]));
  svg.appendChild(handle);
  if (focused) handle.focus();
}

function setWeight(value) {
  state.weights[state.block * state.blockSize + state.weight] = value;
  update(false);
}

function startDrag(event) {
  const svg = by('line'), handle = event.target;
  event.preventDefault();
  handle.focus();
  svg.setPointerCapture(event.pointerId);
  const move = (e) => {
    const box = svg.getBoundingClientRect();
    setWeight(within(fromX(((e.clientX - box.left) / box.width) * WIDTH)));
  };
  const end = () => {
    svg.removeEventListener('pointermove', move);
    svg.removeEventListener('pointerup', end);
    svg.removeEventListener('pointercancel', end);
    update();
  };
  svg.addEventListener('pointermove', move);
  svg.addEventListener('pointerup', end);
  svg.addEventListener('pointercancel', end);
}

function press(event) {
  const i = state.block * state.blockSize + state.weight, step = reach / (event.shiftKey ? 20 : 200);
  const count = Math.min(state.blockSize, state.weights.length - state.block * state.blockSize);
  if (event.key === 'ArrowRight') setWeight(within(state.weights[i] + step));
  else if (event.key === 'ArrowLeft') setWeight(within(state.weights[i] - step));
  else if (event.key === 'ArrowUp') { state.weight = (state.weight + 1) % count; update(); }
  else if (event.key === 'ArrowDown') { state.weight = (state.weight + count - 1) % count; update(); }
  else return;
  event.preventDefault();
}

function showWeight(all) {
  const { block, weight, blockSize, weights } = state, i = block * blockSize + weight, code = all.code(i);
  const largest = all.plain[block];
  by('x').textContent = show(weights[i]);
  by('scaled').textContent = show(largest ? weights[i] / largest : 0);
  by('code').textContent = `${code} (${code.toString(2).padStart(4, '0')})`;
  by('grid-value').textContent = show(codebook(all.grid).values[code]);
  by('absmax').textContent = show(all.absmax[block]);
  by('decoded').textContent = show(all.decoded[i]);
  by('error').textContent = show(all.decoded[i] - weights[i]);
  by('value').value = show(weights[i]);
}

function showTotals(all) {
  const table = by('totals'), others = ['nf4', 'int4'].filter((grid) => grid !== all.grid).map(encodeAll);
  while (table.rows.length > 1) table.deleteRow(1);
  for (const one of [all, ...others]) {
    const row = table.insertRow(), cells = [GRIDS[one.grid], one.bits.toFixed(4), show(one.mse),
      `${(100 * one.relative).toFixed(3)} %`, show(one.largest)];
    row.dataset.grid = one.grid;
    for (const cell of cells) row.insertCell().textContent = cell;
    if (one === all) row.style.fontWeight = 'bold';
  }
}

function drawBins(all) {
  const svg = by('bins'), n = state.weights.length, counts = new Array(16).fill(0), { codes } = codebook(all.grid);
  for (let i = 0; i < n; i += 1) counts[all.code(i)] += 1;
  const shares = codes.map((code) => counts[code] / n), mine = all.code(state.block * state.blockSize + state.weight);
  const top = Math.max(0.16, ...shares), width = (WIDTH - 2 * MARGIN) / codes.length, height = 170;
  svg.replaceChildren();
  shares.forEach((share, rank) => {
    const h = (share / top) * height, x = MARGIN + rank * width;
    const bar = add(svg, 'rect', { x: x + 3, y: 190 - h, width: width - 6, height: h,
      class: codes[rank] === mine ? 'bar mine' : 'bar', 'data-code': codes[rank], 'data-share': share });
    add(bar, 'title', {}, `code ${codes[rank]}`);
    add(svg, 'text', { x: x + width / 2, y: 184 - h, 'text-anchor': 'middle' }, (100 * share).toFixed(1));
    add(svg, 'text', { x: x + width / 2, y: 207, 'text-anchor': 'middle' }, codes[rank].toString(16));
  });
  const equal = 190 - (1 / 16 / top) * height;
  add(svg, 'line', { class: 'equal', x1: MARGIN, x2: WIDTH - MARGIN, y1: equal, y2: equal });
  by('masses').textContent = `They hold ${(100 * Math.min(...shares)).toFixed(2)} to ${
    (100 * Math.max(...shares)).toFixed(2)} %; a sixteenth is 6.25 %.`;
}

function showSteps(all) {
  const { blockSize, block, weights } = state, count = all.plain.length, of = Math.floor(block / 256);
  const nested = encode_absmax(all.plain), back = decode_absmax(nested), code = nested.absmax_codes[block];
  const offset = nested.offset[0], centred = Math.fround(all.plain[block] - offset), map = nested.map[code];
  const bits = (double) => ((8 * storage(weights.length, blockSize, double)) / weights.length).toFixed(4);
  const steps = [
    `Each of the ${count} blocks has an absmax, a float32: 32 / ${blockSize} = ${show(32 / blockSize)} bits per weight. ` +
      `That of block ${block} is <code id="dq-absmax">${show(all.plain[block])}</code>.`,
    `Their mean, <code id="dq-offset">${show(offset)}</code>, is stored once and taken off: absmax - mean = ` +
      `<code>${show(centred)}</code>.`,
    `Every 256 of what is left have an absmax of their own, here <code id="dq-nested">${
      show(nested.nested_absmax[of])}</code>: 32 / (256 · ${blockSize}) bits per weight.`,
    `Over it, the rest takes the nearest of a map of 256 values: code <code id="dq-code">${code}</code>, ` +
      `<code>${show(map)}</code>: 8 / ${blockSize} = ${show(8 / blockSize)} bits per weight.`,
    `Decoded: ${show(map)} · ${show(nested.nested_absmax[of])} + ${show(offset)} = <code id="dq-decoded">${
      show(back[block])}</code>, off by <code id="dq-error">${show(back[block] - all.plain[block])}</code>.`,
    `In all <code id="dq-bits">${bits(true)}</code> bits per weight, and <code>${bits(false)}</code> without.`,
  ];
  by('steps').innerHTML = steps.map((step) => `<li>${step}</li>`).join('');
  const svg = by('scales'), top = Math.max(...all.plain) || 1, shown = Math.min(count, 256);
  const start = Math.min(Math.floor(block / shown) * shown, count - shown), width = (WIDTH - 2 * MARGIN) / shown;
  svg.replaceChildren();
  for (let k = 0; k < shown; k += 1) {
    const h = (all.plain[start + k] / top) * 125, y = 135 - (back[start + k] / top) * 125;
    add(svg, 'rect', { x: MARGIN + k * width, y: 135 - h, width: Math.max(1, width - 1), height: h,
      class: start + k === block ? 'bar mine' : 'bar' });
    add(svg, 'line', { x1: MARGIN + k * width, x2: MARGIN + (k + 1) * width, y1: y, y2: y, stroke: '#000' });
  }
  const y = 135 - (offset / top) * 125;
  add(svg, 'line', { class: 'equal', x1: MARGIN, x2: WIDTH - MARGIN, y1: y, y2: y });
  add(svg, 'text', { x: WIDTH - MARGIN, y: y - 4, 'text-anchor': 'end' }, 'mean');
}

/** Compute and draw everything; rescale the line unless a weight is on its way. */
function update(rescale = true) {
  try {
    const count = Math.ceil(state.weights.length / state.blockSize);
    state.block = Math.max(0, Math.min(count - 1, state.block));
    const last = Math.min(state.blockSize, state.weights.length - state.block * state.blockSize) - 1;
    state.weight = Math.max(0, Math.min(last, state.weight));
    const all = encodeAll(state.grid);
    if (rescale) reach = 1.2 * (all.plain[state.block] || 1);
    by('grid').value = state.grid;
    by('block').value = state.block;
    by('block').max = count - 1;
    by('blocks').textContent = count;
    by('weight').value = state.weight;
    by('weight').max = last;
    by('count').textContent = state.weights.length.toLocaleString('en');
    showWeight(all);
    drawLine(all);
    showTotals(all);
    drawBins(all);
    showSteps(all);
    by('problem').textContent = '';
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    by('problem').textContent = `refused: ${error.message}`;
  }
}

const option = (value, text) => new Option(text, value);
by('grid').append(...Object.entries(GRIDS).map(([name, words]) => option(name, words)));
by('block-size').append(...SIZES.map((size) => option(size, size)));
by('source').append(...[...Object.keys(DISTRIBUTIONS), ...Object.keys(TENSORS)].map((name) => option(name, name)));
by('block-size').value = state.blockSize;
const whole = (id) => Math.floor(Number(by(id).value)) || 0;
const CHANGES = {
  grid: () => { state.grid = by('grid').value; },
  'block-size': () => { state.blockSize = Number(by('block-size').value); },
  source: () => { state.source = by('source').value; load(); },
  double: () => { state.double = by('double').checked; },
  block: () => { state.block = whole('block'); },
  weight: () => { state.weight = whole('weight'); },
  value: () => {
    const i = state.block * state.blockSize + state.weight;
    state.weights[i] = Number(by('value').value); // an infinity is refused, with words
  },
};
for (const [id, change] of Object.entries(CHANGES)) by(id).addEventListener('change', () => { change(); update(); });
by('switch').addEventListener('click', () => { state.grid = state.grid === 'nf4' ? 'int4' : 'nf4'; update(); });
by('draw').addEventListener('click', () => { state.seed += 1; load(); update(); });
by('settings').addEventListener('submit', (event) => event.preventDefault());
load();
update();
