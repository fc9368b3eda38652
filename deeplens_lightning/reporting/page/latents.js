// The list of latents, and for the chosen one the contexts on which it is most active.

function latentSection(found) {
  const grid = found.some((entry) => entry.sae);
  const entries = found.map((entry) => ({
    ...entry,
    top: entry.contexts.length ? entry.contexts[0].value : 0,
    text: entry.contexts.map((c) => c.tokens[c.peak]).join(' ').toLowerCase(),
  }));
  const orders = {
    number: (a, b) => a.sae.localeCompare(b.sae) || a.latent - b.latent,
    'strongest first': (a, b) => b.top - a.top,
    'most frequent first': (a, b) => b.frequency - a.frequency,
  };
  const list = element('div', { class: 'list', role: 'listbox', 'aria-label': 'latents' });
  const panel = element('div', { class: 'card', 'aria-live': 'polite' });
  const search = element('input', { type: 'search', placeholder: 'number or token', 'aria-label': 'find latents' });
  const order = element('select', { 'aria-label': 'order' }, ...Object.keys(orders).map((n) => element('option', {}, n)));
  const count = element('span', { class: 'quiet' });
  let shown = [];
  let current = null;

  function context(entry, item) {
    const line = element('div', { class: 'context' }, element('span', { class: 'value' }, format(item.value)));
    const nodes = item.tokens.map((token, i) => {
      const value = item.values[i];
      const node = shaded(token, value === null ? 0 : value / (entry.top || 1), 210);
      if (i === item.peak) node.classList.add('peak');
      node.title = value === null ? 'unknown' : format(value);
      return node;
    });
    line.append(...inOneLine(item.tokens, nodes));
    line.append(element('span', { class: 'quiet' }, `  document ${item.document}, token ${item.position}`));
    return line;
  }

  function show(entry) {
    current = entry;
    for (const button of list.children) button.setAttribute('aria-current', String(button.dataset.latent === String(entry.latent) && button.dataset.sae === entry.sae));
    const share = (100 * entry.frequency).toPrecision(3);
    const facts = `reads ${entry.reads.join(', ')}; above 0 on ${share}% of ${format(entry.rows)} rows at step ${format(entry.step)}`;
    panel.replaceChildren(
      element('h3', {}, `latent ${entry.latent}${entry.sae ? ` of ${entry.sae}` : ''}`),
      element('div', { class: 'quiet' }, facts),
      ...(entry.contexts.length ? entry.contexts.map((c) => context(entry, c)) : [element('p', {}, 'It never fired on them.')]),
    );
  }

  function fill() {
    const wanted = search.value.trim().toLowerCase();
    shown = entries.filter((e) => !wanted || String(e.latent) === wanted || e.text.includes(wanted)).sort(orders[order.value]);
    count.textContent = `${shown.length} of ${entries.length}`;
    list.replaceChildren(...shown.map((entry) => {
      const name = grid ? `${entry.sae} · ${entry.latent}` : String(entry.latent);
      const label = [element('span', {}, name), element('span', { class: 'quiet' }, format(entry.top))];
      const button = element('button', { type: 'button', onclick: () => show(entry) }, ...label);
      button.dataset.latent = entry.latent;
      button.dataset.sae = entry.sae;
      return button;
    }));
    if (shown.length) show(shown.includes(current) ? current : shown[0]);
    else panel.replaceChildren(element('p', {}, 'No latent listed here has that number or token.'));
  }

  list.addEventListener('keydown', (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const next = step && shown[shown.indexOf(current) + step];
    if (!next) return;
    event.preventDefault();
    show(next);
    list.querySelector('[aria-current="true"]').focus();
  });
  search.addEventListener('input', fill);
  order.addEventListener('change', fill);
  order.value = 'strongest first';
  fill();
  return {
    node: element('div', {}, element('div', { class: 'controls' }, search, order, count), element('div', { class: 'latents' }, list, panel)),
    has: (latent, sae) => entries.some((e) => e.latent === latent && e.sae === sae),
    open: (latent, sae) => {
      search.value = '';
      fill();
      show(entries.find((e) => e.latent === latent && e.sae === sae));
    },
  };
}
