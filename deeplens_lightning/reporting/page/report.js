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

// The first path in full, those inside it relative to it, then the others.
function writtenPaths([folder, ...rest]) {
  const inside = rest.filter((p) => p.startsWith(`${folder}/`));
  return [folder, ...inside.map((p) => p.slice(folder.length + 1)), ...rest.filter((p) => !inside.includes(p))];
}

function summaryTable(summary) {
  const since = summary.since_step ?? 0;
  const rows = [
    ...(summary.stopped ? [['stopped by', summary.stopped]] : []),
    ['hook points', summary.hooks.join(', ')],
    ['tokens', `${format(summary.tokens)} in ${format(summary.steps - since)} steps${since ? ` since step ${format(since)}` : ''}`],
    ['tokens/s', format(summary.tokens_per_second)],
    ...Object.entries(summary.metrics).filter(([name]) => /^(val|latents)\//.test(name)).map(([name, v]) => [name, format(v)]),
    ...weightRows(summary),
    ...(summary.written.length ? [['written', ...writtenPaths(summary.written)]] : []),
  ];
  const cells = (values) => values.map((value) => element('div', {}, path(value)));
  const table = rows.map(([name, ...values]) => element('tr', {}, element('th', {}, name), element('td', {}, ...cells(values))));
  return element('div', { class: 'scroll' }, element('table', {}, ...table));
}

// In a grid each SAE has a colour and training is dashed; otherwise training and validation have a colour each.
function curve({ name, stage, sae }, title) {
  const colour = sae ? saes.indexOf(sae) % 6 : Math.max(0, ['train', 'val', 'test'].indexOf(stage));
  return {
    label: [stage, sae].filter(Boolean).join(' ') || (name === title ? '' : name),
    style: `s${colour}${sae && stage === 'train' ? ' dashed' : ''}`,
    points: run.curves[name],
  };
}

function chartOrder(a, b) {
  const first = ['loss', 'fvu', 'l0', 'dead_fraction', 'ce_recovered', 'tokens_per_second'];
  const rank = ({ title }) => (first.includes(title) ? first.indexOf(title) : first.length);
  return rank(a) - rank(b);
}

document.getElementById('name').append(path(run.name));
if (run.earlier.length) document.getElementById('earlier').append('continues ', path(run.earlier.join(', ')));
main.replaceChildren();
if (run.summary) section('summary', 'Summary', summaryTable(run.summary));
const saes = [...new Set(run.charts.flatMap((chart) => chart.series.map((each) => each.sae)))].filter(Boolean);
const constant = Object.entries(run.constant).map(([name, value]) => `${name} ${format(value)}`);
if (run.charts.length || constant.length) {
  const cards = run.charts.sort(chartOrder).map(({ title, series }) => lineChart(title, series.map((each) => curve(each, title))));
  const rest = constant.length ? [element('p', { class: 'quiet' }, `Unchanged during the run: ${constant.join(', ')}`)] : [];
  section('curves', 'Curves', element('div', { class: 'grid' }, ...cards), ...rest);
}
if (run.firing.length) {
  const cards = run.firing.flatMap((of) => ['heldout', 'training'].filter((name) => of[name]).map((name) => {
    const f = of[name];
    const facts = `${format(f.dead)} of ${format(f.latents)} never fired on ${format(f.rows)} rows; ${format(f.dense)} fire on more than a tenth.`;
    const title = `${of.sae ? `${of.sae}: ` : ''}${name === 'heldout' ? 'held-out' : 'training'} rows, step ${format(of.step)}`;
    const label = 'log10 of the fraction of rows on which a latent fires';
    const card = f.bins.length ? histogram(title, f.bins, f.width, label) : element('div', { class: 'card' }, element('h3', {}, title));
    card.append(element('div', { class: 'quiet' }, facts));
    return card;
  }));
  section('firing', 'Firing frequencies', element('div', { class: 'grid' }, ...cards));
}
let latents = null;
if (run.latents.length) {
  latents = latentSection(run.latents);
  section('latents', 'Latents', latents.node);
}
if (run.samples.length) {
  const jump = (latent, sae) => {
    latents.open(latent, sae);
    document.getElementById('latents').scrollIntoView();
  };
  section('samples', 'Single samples', sampleSection(run.samples, latents, jump));
}
