//! Greedy generation with a key-value cache over a ragged, refilled batch.
//!
//! Every product of a session has the same number of rows, that of a prompt longer than [`PREFILL`]
//! apart, and prompts start at multiples of [`ALIGNMENT`], so that the tokens of a row do not depend on
//! the rows beside it, nor on how many there are: what is missing is padding, which no row reads.

use std::cell::Cell;
use std::collections::VecDeque;
use std::path::Path;

use model::{Adapter, GenerateOptions, Generated, MicroBatch};

use crate::adapter::Lora;
use crate::attention::Attention;
use crate::device::{Buffer, Device, args};
use crate::gemm::{Gemm, View};
use crate::graph::Recorder;
use crate::sizes::{check_decoding, check_folder};
use crate::step::pass::{Pass, gather};
use crate::step::{Batch, COLUMNS, Step};
use crate::{CudaError, Frozen};

/// Rows of a prefill, unless its prompt is longer.
const PREFILL: usize = 4096;
/// Rows of the tiles of every attention kernel divide this.
const ALIGNMENT: usize = 128;

/// A model with its adapter, ready to answer. Buffers go before the device.
pub struct Generator {
    /// Rows that were decoded together where memory did not allow those asked for.
    reduced: Cell<Option<usize>>,
    lora: Lora,
    frozen: Frozen,
    device: Device,
}

/// Keys and values of all layers; see `generate.cu`.
pub(crate) struct Cache {
    layers: Vec<Buffer>,
    /// Positions of a slot.
    length: usize,
    /// A token a row and attention over the cache, else prompts and attention inside them.
    is_decoding: bool,
}

impl Cache {
    fn new(
        device: &Device,
        frozen: &Frozen,
        slots: usize,
        length: usize,
    ) -> Result<Self, CudaError> {
        let c = &frozen.config;
        let width = c.num_key_value_heads * c.head_dim;
        let layer = || device.elements(slots * 2 * length * width);
        let layers = (0..c.num_hidden_layers).map(|_| layer()).collect::<Result<_, _>>()?;
        Ok(Self { layers, length, is_decoding: false })
    }

    /// Appends the keys and values of `b` to the cache of `layer`, and attends.
    pub(crate) fn attend(
        &self,
        device: &Device,
        layer: usize,
        a: &Attention,
        b: &Batch,
    ) -> Result<(), CudaError> {
        let width = a.kv_heads * a.d;
        let vector = 16 / device.dtype.size() as usize;
        let packs = b.n * 2 * width / vector;
        let (slots, positions, cache) = (b.labels, b.positions, self.layers[layer].ptr());
        let [ld, first, width, rows, length, kv_heads, d, ldo] =
            [a.ld, a.heads * a.d, width, b.n, self.length, a.kv_heads, a.d, a.ldo]
                .map(|v| v as i32);
        let (qkv, out) = (a.qkv, a.out);
        // SAFETY: slots and positions lie inside the cache, which `Session` sees to.
        unsafe {
            let args = args![qkv, ld, first, width, slots, positions, cache, length, rows];
            device.launch((FILE, "cache_append"), [packs.div_ceil(256), 1], 256, 0, args)?;
            if !self.is_decoding {
                return a.forward(device);
            }
            let (scale, softcap) = (a.scale, a.softcap);
            let window = if a.window < self.length { a.window as i32 } else { 0 };
            let args = args![
                qkv, ld, out, ldo, cache, slots, positions, kv_heads, d, length, scale, softcap,
                window
            ];
            device.launch((FILE, "decode_attention"), [b.n, a.heads], 128, 0, args)
        }
    }
}

const FILE: &str = "generate.cu";

/// A row being decoded.
struct Row {
    prompt: usize,
    slot: usize,
    tokens: Vec<u32>,
    /// Position of the newest token, which is not in the cache yet.
    position: usize,
}

/// Buffers of one call.
struct Session<'a> {
    own: &'a Generator,
    slots: usize,
    step: Step,
    cache: Cache,
    /// `[slots, hidden]`: last rows, in the type of the residual stream, and their norms.
    last: Buffer,
    normed: Buffer,
    roots: Buffer,
    /// `[slots, vocabulary]`, f32.
    logits: Buffer,
    ids: Buffer,
    recorder: Recorder,
}

impl Generator {
    /// Loads the weights of a model folder and an adapter, which may have no factors.
    ///
    /// # Errors
    /// [`CudaError`] naming what is missing, or where memory runs out.
    pub fn load(device: Device, folder: &Path, adapter: &Adapter) -> Result<Self, CudaError> {
        // Before minutes of loading.
        check_folder(folder, device.dtype)?;
        let frozen = Frozen::load(&device, folder)?;
        Self::new(device, frozen, adapter)
    }

    /// Takes weights that are on the device.
    ///
    /// # Errors
    /// [`CudaError`] where memory runs out, or for a size that the kernels do not serve.
    pub fn new(device: Device, frozen: Frozen, adapter: &Adapter) -> Result<Self, CudaError> {
        check_decoding(&frozen.config, device.dtype)?;
        let lora = Lora::new(&device, &frozen.config, adapter)?;
        Ok(Self { reduced: Cell::new(None), lora, frozen, device })
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Rows that were decoded together where memory did not allow those asked for: products had
    /// another shape than they would have had.
    pub fn reduced_rows(&self) -> Option<usize> {
        self.reduced.get()
    }

    /// Rows of the products that decode: those asked for, in whole steps, unless memory was short.
    pub fn rows(&self, batch_size: usize) -> usize {
        self.reduced.get().unwrap_or_else(|| batch_size.max(1).next_multiple_of(8))
    }

    /// Generates greedily for every prompt, calling `done` as rows finish, in any order; `done`
    /// returns false to stop early. Where memory is short fewer rows are decoded together.
    ///
    /// # Errors
    /// [`CudaError::Input`] for a prompt that is empty, beyond the context or outside the vocabulary.
    pub fn generate(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        done: &mut dyn FnMut(Generated) -> bool,
    ) -> Result<(), CudaError> {
        self.check(prompts, options)?;
        let mut is_answered = vec![false; prompts.len()];
        self.reduced.set(None);
        let mut slots = self.rows(options.batch_size);
        loop {
            let waiting = (0..prompts.len()).filter(|i| !is_answered[*i]).collect();
            let mut note = |generated: Generated| {
                is_answered[generated.prompt] = true;
                done(generated)
            };
            match self.attempt(slots, prompts, waiting, options, &mut note) {
                Err(error) if error.is_memory() && slots > 8 => {
                    slots = (slots / 2).next_multiple_of(8);
                    self.reduced.set(Some(slots));
                }
                other => return other,
            }
        }
    }

    /// Answers the prompts that wait, `slots` at a time.
    fn attempt(
        &self,
        slots: usize,
        prompts: &[Vec<u32>],
        waiting: VecDeque<usize>,
        options: &GenerateOptions,
        done: &mut dyn FnMut(Generated) -> bool,
    ) -> Result<(), CudaError> {
        self.device.reset_peak();
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(1);
        let mut session = Session::new(self, slots, longest, longest + options.max_new_tokens)?;
        // The fewest slots may take what there is.
        let reserve = if slots > 8 { self.device.check_reserve() } else { Ok(()) };
        let ran = reserve
            .and_then(|()| session.step.keep_weights(&self.device, &self.frozen, &self.lora))
            .and_then(|_| session.run(prompts, waiting, options, done));
        if ran.as_ref().is_err_and(CudaError::is_memory) {
            // Work under way reads and writes what the session drops.
            self.device.drain()?;
        }
        ran
    }

    fn check(&self, prompts: &[Vec<u32>], options: &GenerateOptions) -> Result<(), CudaError> {
        let c = &self.frozen.config;
        let limit = c.max_position_embeddings.saturating_sub(options.max_new_tokens);
        for (index, prompt) in prompts.iter().enumerate() {
            let fault = if prompt.is_empty() || prompt.len() > limit {
                format!("has {} tokens; between 1 and {limit} fit", prompt.len())
            } else if let Some(token) = prompt.iter().find(|t| **t as usize >= c.vocab_size) {
                format!("has token id {token}, outside the vocabulary of {}", c.vocab_size)
            } else {
                continue;
            };
            return Err(CudaError::Input(format!("prompt {index} {fault}")));
        }
        Ok(())
    }
}

impl<'a> Session<'a> {
    fn new(
        own: &'a Generator,
        slots: usize,
        longest: usize,
        length: usize,
    ) -> Result<Self, CudaError> {
        let Generator { lora, frozen, device, .. } = own;
        // Padding has positions as well.
        let (prefill, positions) = (prefill_rows(longest), length.max(ALIGNMENT));
        let (hidden, vocabulary) = (frozen.config.hidden_size, frozen.config.vocab_size);
        Ok(Self {
            own,
            slots,
            step: Step::forward_only(device, frozen, lora, prefill.max(slots), positions)?,
            cache: Cache::new(device, frozen, slots, length)?,
            last: device.residual_elements(slots * hidden)?,
            normed: device.elements(slots * hidden)?,
            roots: device.alloc(slots as u64 * 4)?,
            logits: device.alloc((slots * vocabulary) as u64 * 4)?,
            ids: device.alloc(slots as u64 * 4)?,
            recorder: Recorder::default(),
        })
    }

    fn run(
        &mut self,
        prompts: &[Vec<u32>],
        mut waiting: VecDeque<usize>,
        options: &GenerateOptions,
        done: &mut dyn FnMut(Generated) -> bool,
    ) -> Result<(), CudaError> {
        let mut free: Vec<usize> = (0..self.slots).rev().collect();
        let mut rows: Vec<Row> = Vec::new();
        loop {
            // A prefill costs as much for one prompt as for many.
            let enough = (self.slots / 4).min(waiting.len()).max(1);
            while !waiting.is_empty() && (rows.is_empty() || free.len() >= enough) {
                let started = self.start(prompts, &mut waiting, &mut free)?;
                rows.extend(started);
                if !retire(&mut rows, &mut free, options, done) {
                    return Ok(());
                }
            }
            if rows.is_empty() {
                return Ok(());
            }
            self.decode(&mut rows)?;
            if !retire(&mut rows, &mut free, options, done) {
                return Ok(());
            }
        }
    }

    /// Runs as many waiting prompts as fit, whole, and picks the first token of each.
    fn start(
        &mut self,
        prompts: &[Vec<u32>],
        waiting: &mut VecDeque<usize>,
        free: &mut Vec<usize>,
    ) -> Result<Vec<Row>, CudaError> {
        let mut rows = Vec::new();
        let mut last = Vec::new();
        let mut slots = Vec::new();
        let (mut tokens, mut bounds): (Vec<i32>, Vec<i32>) = (Vec::new(), vec![0]);
        let room = prefill_rows(waiting.front().map_or(0, |first| prompts[*first].len()));
        while let (Some(&prompt), Some(&slot)) = (waiting.front(), free.last()) {
            let text = &prompts[prompt];
            if tokens.len() + text.len() > room {
                break;
            }
            waiting.pop_front();
            free.pop();
            tokens.extend(text.iter().map(|t| *t as i32));
            bounds.push(tokens.len() as i32);
            last.push(tokens.len() as i32 - 1);
            slots.resize(tokens.len(), slot as i32);
            rows.push(Row { prompt, slot, tokens: Vec::new(), position: text.len() - 1 });
            pad(&mut tokens, &mut bounds, tokens_aligned(last[last.len() - 1]));
            slots.resize(tokens.len(), -1);
        }
        pad(&mut tokens, &mut bounds, room);
        slots.resize(room, -1);
        last.resize(self.slots, 0);
        self.cache.is_decoding = false;
        let ids = self.forward(&tokens, &bounds, |columns| {
            columns[4] = last;
            columns[5] = slots;
        })?;
        for (row, id) in rows.iter_mut().zip(ids) {
            row.tokens.push(id);
            row.position += 1;
        }
        Ok(rows)
    }

    /// Appends one token to every row.
    fn decode(&mut self, rows: &mut [Row]) -> Result<(), CudaError> {
        let column = |value: &dyn Fn(&Row) -> i32, padding: i32| -> Vec<i32> {
            let mut column: Vec<i32> = rows.iter().map(value).collect();
            column.resize(self.slots, padding);
            column
        };
        let tokens = column(&|r| r.tokens.last().map_or(0, |t| *t as i32), 0);
        let positions = column(&|r| r.position as i32, 0);
        let slots = column(&|r| r.slot as i32, -1);
        let bounds: Vec<i32> = (0..=self.slots as i32).collect();
        let every: Vec<i32> = (0..self.slots as i32).collect();
        self.cache.is_decoding = true;
        let ids = self.forward(&tokens, &bounds, |columns| {
            columns[1] = positions;
            columns[4] = every;
            columns[5] = slots;
        })?;
        for (row, id) in rows.iter_mut().zip(ids) {
            row.tokens.push(id);
            row.position += 1;
        }
        Ok(())
    }

    /// One forward pass; the greedy next token after each of the rows named in column 4.
    fn forward(
        &self,
        tokens: &[i32],
        bounds: &[i32],
        change: impl FnOnce(&mut [Vec<i32>; COLUMNS]),
    ) -> Result<Vec<u32>, CudaError> {
        let Generator { lora, frozen, device, .. } = self.own;
        let targets = vec![-100; tokens.len()];
        let batch = MicroBatch { tokens, cu_seqlens: bounds, targets: &targets };
        let b = self.step.upload_with(device, batch, change)?;
        let cache = Some(&self.cache);
        let pass = Pass { cache, ..self.step.pass(device, frozen, lora, &b)? };
        if self.cache.is_decoding {
            // One shape a session, at addresses that stay.
            self.recorder.run(device, [0; 5], || self.enqueue(&pass), || ())?;
        } else {
            self.enqueue(&pass)?;
        }
        let bytes = device.read(&self.ids, self.slots * 4)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
    }

    /// All layers, and the greedy choice after each row named in column 4.
    fn enqueue(&self, pass: &Pass<'_>) -> Result<(), CudaError> {
        let Generator { frozen, device, .. } = self.own;
        pass.trunk()?;
        let c = &frozen.config;
        let (hidden, vocabulary, rows) = (c.hidden_size, c.vocab_size, self.slots);
        let out = self.step.residual(c.num_hidden_layers);
        gather(device, (out, hidden), pass.b.rows, self.last.ptr(), rows)?;
        let normed = (self.normed.ptr(), hidden);
        pass.norm_rows(self.last.ptr(), frozen.norm.ptr(), normed, self.roots.ptr(), rows)?;
        let (x, head) = (View::new(normed.0, hidden), View::new(frozen.head(), hidden).t());
        let logits = View::new(self.logits.ptr(), vocabulary);
        let product = Gemm::new((rows, vocabulary, hidden), x, head, logits);
        device.gemm("gemm head", Gemm { f32_out: true, ..product })?;
        let (from, ids, columns) = (self.logits.ptr(), self.ids.ptr(), vocabulary as i32);
        let softcap = c.variations.final_logit_softcapping.unwrap_or(0.0);
        // SAFETY: `rows` rows of logits and ids.
        unsafe {
            let args = args![from, columns, softcap, ids];
            device.launch((FILE, "argmax"), [rows, 1], 1024, 0, args)
        }
    }
}

/// Rows of the prefill whose first prompt has `length` tokens; a longer one fills it alone.
fn prefill_rows(length: usize) -> usize {
    length.next_multiple_of(ALIGNMENT).max(PREFILL)
}

/// Rows up to the next multiple of [`ALIGNMENT`] after row `last`.
fn tokens_aligned(last: i32) -> usize {
    (last as usize + 1).next_multiple_of(ALIGNMENT)
}

/// Fills up with short sequences that nothing reads.
fn pad(tokens: &mut Vec<i32>, bounds: &mut Vec<i32>, to: usize) {
    while tokens.len() < to {
        let end = (tokens.len() + 1).next_multiple_of(ALIGNMENT).min(to);
        tokens.resize(end, 0);
        bounds.push(end as i32);
    }
}

/// Hands over finished rows and frees their slots; false where the caller wants no more.
fn retire(
    rows: &mut Vec<Row>,
    free: &mut Vec<usize>,
    options: &GenerateOptions,
    done: &mut dyn FnMut(Generated) -> bool,
) -> bool {
    let mut index = 0;
    while index < rows.len() {
        let tokens = &rows[index].tokens;
        let ended = tokens.last().is_some_and(|t| options.end_tokens.contains(t));
        if !ended && tokens.len() < options.max_new_tokens {
            index += 1;
            continue;
        }
        let Row { prompt, slot, mut tokens, .. } = rows.swap_remove(index);
        free.push(slot);
        if ended {
            tokens.pop();
        }
        if !done(Generated { prompt, tokens, ended }) {
            return false;
        }
    }
    true
}
