// Single samples over time: the text, shaded by the chosen quantity, and a table with the numbers of each token.

const MEASURES = { relative_error: ['relative error', 0], norm: ['activation norm', 210], l0: ['L0', 140] };

function sampleSection(samples, latents, jump) {
  let sample = samples[0];
  let at = sample.looks.length - 1; // index of the step shown
  let token = 0;
  const which = element('select', { 'aria-label': 'text' }, ...samples.map((s, i) => element('option', { value: i }, s.name)));
  const measure = element('select', { 'aria-label': 'shade by' });
  const slider = element('input', { type: 'range', min: 0, 'aria-label': 'step' });
  const step = element('span', { class: 'quiet' });
  const strip = element('div', { class: 'strip' });
  const table = element('div', { class: 'scroll' });

  function latentCell(numbers, values) {
    const cell = element('td', {});
    (numbers || []).forEach((number, i) => {
      const label = `${number}: ${format(values[i])}`;
      const known = latents && latents.has(number, sample.sae);
      cell.append(known ? element('button', { type: 'button', onclick: () => jump(number, sample.sae) }, label) : label, '  ');
    });
    return cell;
  }

  function row(now, i) {
    const cells = [element('td', { class: 'number' }, String(i)), element('td', { dir: 'auto' }, sample.tokens[i])];
    for (const name of Object.keys(MEASURES)) {
      if (now[name]) cells.push(element('td', { class: 'number' }, format(now[name][i])));
    }
    return element('tr', {}, ...cells, latentCell(now.latents && now.latents[i], now.values && now.values[i]));
  }

  function draw() {
    const now = sample.looks[at];
    const values = now[measure.value] || [];
    const numbers = sample.looks.flatMap((record) => record[measure.value] || []).filter((v) => v !== null);
    const top = Math.max(...numbers, 1e-12);
    step.textContent = `step ${format(now.step)}`;
    const nodes = sample.tokens.map((text, i) => {
      const value = values[i] ?? null;
      const node = shaded(text, value === null ? 0 : value / top, MEASURES[measure.value][1]);
      node.title = value === null ? 'unknown' : `${MEASURES[measure.value][0]} ${format(value)}`;
      if (i === token) node.classList.add('chosen');
      node.addEventListener('click', () => { token = i; draw(); });
      return node;
    });
    strip.replaceChildren(...inOneLine(sample.tokens, nodes));
    const names = ['', 'token', ...Object.keys(MEASURES).filter((n) => now[n]).map((n) => MEASURES[n][0]), `strongest latents${sample.sae ? ` of ${sample.sae}` : ''}`];
    const quantities = Object.values(MEASURES).map((m) => m[0]);
    const head = element('tr', {}, ...names.map((n) => element('th', quantities.includes(n) ? { class: 'number' } : {}, n)));
    const order = [token, ...sample.tokens.keys()].filter((i, n, all) => all.indexOf(i) === n);
    table.replaceChildren(element('table', {}, head, ...order.map((i) => row(now, i))));
  }

  function choose() {
    sample = samples[Number(which.value)];
    at = sample.looks.length - 1;
    token = 0;
    const here = Object.keys(MEASURES).filter((n) => sample.looks.some((record) => record[n]));
    measure.replaceChildren(...here.map((n) => element('option', { value: n }, MEASURES[n][0])));
    slider.max = at;
    slider.value = at;
    draw();
  }

  which.addEventListener('change', choose);
  measure.addEventListener('change', draw);
  slider.addEventListener('input', () => { at = Number(slider.value); draw(); });
  choose();
  return element('div', {}, element('div', { class: 'controls' }, which, measure, slider, step), strip, table);
}
