// Make HTML elements and SVG charts. Text is always set as text, never parsed as markup.

const SVG = 'http://www.w3.org/2000/svg';

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function shape(tag, attributes = {}, text = '') {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== '') node.textContent = text;
  return node;
}

function format(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return '–';
  if (Number.isInteger(value)) return value.toLocaleString('en');
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

// Round numbers between low and high, 2 to 6 of them.
function ticks(low, high) {
  const raw = (high - low) / 6 || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i += 1) found.push(Number((i * step).toPrecision(12)) + 0);
  return found;
}

// Round values between low and high for a logarithmic axis: powers of ten, or with numbers between them if there are few.
function logTicks(low, high) {
  const within = (digits) => {
    const found = [];
    for (let power = Math.floor(low); power <= high; power += 1) found.push(...digits.map((d) => d * 10 ** power));
    return found.filter((v) => Math.log10(v) >= low && Math.log10(v) <= high);
  };
  const found = [[1], [1, 3], [1, 2, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]].map(within).find((values) => values.length > 2);
  const every = found ? Math.ceil(found.length / 6) : 1;
  return (found || ticks(10 ** low, 10 ** high)).filter((_, i) => i % every === 0);
}

// Labels of evenly spaced values, with as many digits as they need to differ.
function labels(values) {
  const step = values.length > 1 ? Math.abs(values[1] - values[0]) : Math.abs(values[0]) || 1;
  const most = Math.max(...values.map(Math.abs));
  if (most >= 1e5 || (most > 0 && most < 1e-3)) {
    const digits = Math.min(15, Math.max(1, Math.ceil(Math.log10(most / step)) + 1));
    const notation = most >= 1e5 ? 'compact' : 'scientific';
    return values.map((v) => (v === 0 ? '0' : v.toLocaleString('en', { notation, maximumSignificantDigits: digits })));
  }
  const decimals = Math.min(12, Math.max(0, Math.ceil(-Math.log10(step) - 1e-9)));
  return values.map((v) => v.toLocaleString('en', { minimumFractionDigits: decimals, maximumFractionDigits: decimals }));
}

function scale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

const FRAME = { width: 360, height: 190, left: 48, right: 10, top: 8, bottom: 22 };

function axes(svg, x, y, xs, ys, yLabels = labels(ys)) {
  const f = FRAME;
  const xLabels = labels(xs);
  ys.forEach((value, i) => {
    svg.append(
      shape('line', { class: 'axis', x1: f.left, x2: f.width - f.right, y1: y(value), y2: y(value) }),
      shape('text', { x: f.left - 5, y: y(value) + 4, 'text-anchor': 'end' }, yLabels[i]),
    );
  });
  xs.forEach((value, i) => {
    const anchor = x(value) > f.width - 30 ? 'end' : 'middle';
    svg.append(shape('text', { x: x(value), y: f.height - 6, 'text-anchor': anchor }, xLabels[i]));
  });
}

// A chart of one or more curves: series is [{label, style, points: [[step, value], ...]}, ...].
function lineChart(title, series) {
  const f = FRAME;
  const values = series.flatMap(({ points }) => points.map((p) => p[1]));
  const positive = values.every((v) => v > 0);
  let logarithmic = positive && Math.max(...values) > 50 * Math.min(...values);
  const legend = element('div', { class: 'legend' });
  const svg = shape('svg', { viewBox: `0 0 ${f.width} ${f.height}`, role: 'img', 'aria-label': title });
  const card = element('div', { class: 'card chart' });
  const head = element('div', { class: 'head' }, element('h3', {}, title));
  if (positive) {
    const toggle = element('button', { type: 'button', onclick: () => { logarithmic = !logarithmic; draw(); } }, 'log');
    head.append(toggle);
  }
  card.append(head, svg, legend);

  function read(step) {
    legend.replaceChildren(...series.map(({ label, style, points }) => {
      const at = step === null ? points[points.length - 1]
        : points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
      return element('span', { class: style }, `${label} ${format(at[1])} @ ${format(at[0])}`.trim());
    }));
  }

  function draw() {
    svg.replaceChildren();
    const to = (v) => (logarithmic ? Math.log10(v) : v);
    const steps = series.flatMap(({ points }) => points.map((p) => p[0]));
    const low = Math.min(...values.map(to));
    const high = Math.max(...values.map(to));
    const margin = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
    const x = scale(Math.min(...steps), Math.max(...steps), f.left, f.width - f.right);
    const y = scale(low - margin, high + margin, f.height - f.bottom, f.top);
    const across = ticks(Math.min(...steps), Math.max(...steps));
    if (logarithmic) {
      const shown = logTicks(low - margin, high + margin);
      axes(svg, x, (v) => y(Math.log10(v)), across, shown, shown.map(format));
    } else {
      axes(svg, x, y, across, ticks(low - margin, high + margin));
    }
    series.forEach(({ style, points }) => {
      const path = points.map((p, n) => `${n ? 'L' : 'M'}${x(p[0]).toFixed(1)} ${y(to(p[1])).toFixed(1)}`).join('');
      svg.append(shape('path', { class: `curve ${style}`, d: path }));
      if (points.length < 40) {
        for (const p of points) svg.append(shape('circle', { class: style, cx: x(p[0]), cy: y(to(p[1])), r: 1.8 }));
      }
    });
    const cursor = shape('line', { class: 'cursor', y1: f.top, y2: f.height - f.bottom, visibility: 'hidden' });
    svg.append(cursor);
    const back = scale(f.left, f.width - f.right, Math.min(...steps), Math.max(...steps));
    svg.onpointermove = (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * f.width;
      cursor.setAttribute('x1', at);
      cursor.setAttribute('x2', at);
      cursor.setAttribute('visibility', 'visible');
      read(back(at));
    };
    svg.onpointerleave = () => { cursor.setAttribute('visibility', 'hidden'); read(null); };
    if (positive) head.querySelector('button').setAttribute('aria-pressed', String(logarithmic));
  }

  draw();
  read(null);
  return card;
}

// A histogram: bins is [[left edge, count], ...], all of the same width.
function histogram(title, bins, width, xLabel) {
  const f = FRAME;
  const svg = shape('svg', { viewBox: `0 0 ${f.width} ${f.height + 14}`, role: 'img', 'aria-label': title });
  const low = Math.min(...bins.map((b) => b[0]));
  const high = Math.max(...bins.map((b) => b[0])) + width;
  const most = Math.max(...bins.map((b) => b[1]));
  const x = scale(low, high, f.left, f.width - f.right);
  const y = scale(0, most, f.height - f.bottom, f.top);
  axes(svg, x, y, ticks(low, high), ticks(0, most));
  for (const [left, count] of bins) {
    const bar = shape('rect', {
      class: 'bar', x: x(left) + 0.5, y: y(count), width: Math.max(1, x(left + width) - x(left) - 1), height: y(0) - y(count),
    });
    bar.append(shape('title', {}, `${format(count)} latents between 10^${left.toFixed(1)} and 10^${(left + width).toFixed(1)}`));
    svg.append(bar);
  }
  svg.append(shape('text', { x: (f.left + f.width) / 2, y: f.height + 10, 'text-anchor': 'middle' }, xLabel));
  return element('div', { class: 'card chart' }, element('h3', {}, title), svg);
}

// A path that wraps only after a slash.
function path(text) {
  const parts = text.split(/(?<=\/)/);
  return element('span', {}, ...parts.flatMap((part) => [part, element('wbr')]));
}

// Tokens in a row; a word that consists of several tokens is not wrapped inside.
function inOneLine(texts, nodes) {
  const joins = (i) => i > 0 && /[\p{L}\p{N}]$/u.test(texts[i - 1]) && /^[\p{L}\p{N}]/u.test(texts[i]);
  return nodes.flatMap((node, i) => (joins(i) ? ['\u2060', node] : [node]));
}

// A token on a background of the given hue; share (0 to 1) is its opacity.
function shaded(text, share, hue) {
  const token = element('span', { class: 'token', dir: 'auto' }, text);
  if (share > 0) token.style.backgroundColor = `hsl(${hue} 85% 55% / ${(Math.min(1, share) * 0.75).toFixed(3)})`;
  return token;
}
