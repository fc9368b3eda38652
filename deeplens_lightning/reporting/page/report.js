// Build the page from the data block: one section for each kind of result that the run has.

const run = JSON.parse(document.getElementById('data').textContent);
const main = document.getElementById('main');
const nav = document.getElementById('nav');

function section(id, title, ...content) {
  const node = element('section', { id }, element('h2', {}, title), ...content);
  main.append(node);
  nav.append(element('a', { href: `#${id}` }, title));
  return node;
}

// A run of an earlier release does not name the files of its weights.
function weightRows({ figures, last, best = [] }) {
  const where = (saved) => `step ${format(saved.step)}: ${saved.file ?? `these weights are not kept: ${saved.why_not}`}`;
  const same = !figures || where(figures) === where(last ?? figures);
  const older = (b) => (b.value_is_older ? ', measured before the weights of this file' : '');
  const at = (b) => (b.step === null ? '' : ` at step ${format(b.step)}`);
  return [
    ...(same ? [] : [['weights of these figures', where(figures)]]),
    ...(last ? [[same ? 'weights' : 'last weights', where(last)]] : []),
    ...best.map((b) => [`best ${b.monitor}`, `${format(b.value)}${older(b)}${at(b)}: ${b.file}`]),
  ];
}

function summaryTable(summary) {
  const rows = [
    ...(summary.stopped ? [['stopped by', summary.stopped]] : []),
    ['hook points', summary.hooks.join(', ')],
    ['tokens', format(summary.tokens)],
    ['steps', format(summary.steps)],
    ['tokens/s', format(summary.tokens_per_second)],
    ...Object.entries(summary.metrics).filter(([name]) => /^(val|latents)\//.test(name)).map(([name, v]) => [name, format(v)]),
    ...weightRows(summary),
    ...summary.written.map((path) => ['written', path]),
  ];
  return element('table', {}, ...rows.map(([name, value]) => element('tr', {}, element('th', {}, name), element('td', {}, value))));
}

// Curves of one quantity share a chart: train/fvu, val/fvu, and val/fvu/<name> of each SAE of a grid.
function chartGroups(names) {
  const groups = new Map();
  for (const name of names) {
    const parts = name.split('/');
    const key = ['train', 'val', 'test'].includes(parts[0]) && parts.length > 1 ? parts[1] : name;
    groups.set(key, [...(groups.get(key) || []), name]);
  }
  const first = ['loss', 'fvu', 'l0', 'dead_fraction', 'ce_recovered', 'tokens_per_second'];
  const rank = (key) => (first.includes(key) ? first.indexOf(key) : first.length);
  return [...groups].sort((a, b) => rank(a[0]) - rank(b[0]));
}

document.getElementById('name').textContent = run.name;
main.replaceChildren();
if (run.summary) section('summary', 'Summary', summaryTable(run.summary));
// A single point makes no curve; its value is in the summary.
const groups = chartGroups(run.charts).filter(([, names]) => !run.summary || names.some((n) => run.curves[n].length > 1));
if (groups.length) {
  const cards = groups.map(([title, names]) => lineChart(title, names.map((n) => [n, run.curves[n]])));
  section('curves', 'Curves', element('div', { class: 'grid' }, ...cards));
}
if (run.firing) {
  const cards = ['heldout', 'training'].filter((n) => run.firing[n]).map((name) => {
    const f = run.firing[name];
    const facts = `${format(f.dead)} of ${format(f.latents)} never fired on ${format(f.rows)} rows; ${format(f.dense)} fire on more than a tenth.`;
    const title = `${name === 'heldout' ? 'held-out' : 'training'} rows, step ${format(run.firing.step)}`;
    const label = 'log10 of the fraction of rows on which a latent fires';
    const card = f.bins.length ? histogram(title, f.bins, f.width, label) : element('div', { class: 'card' }, element('h3', {}, title));
    card.append(element('div', { class: 'quiet' }, facts));
    return card;
  });
  section('firing', 'Firing frequencies', element('div', { class: 'grid' }, ...cards));
}
let latents = null;
if (run.latents && run.latents.latents.length) {
  latents = latentSection(run.latents);
  section('latents', 'Latents', latents.node);
}
if (run.samples.length) {
  const jump = (latent) => {
    latents.open(latent);
    document.getElementById('latents').scrollIntoView();
  };
  section('samples', 'Single samples', sampleSection(run.samples, latents, jump));
}
