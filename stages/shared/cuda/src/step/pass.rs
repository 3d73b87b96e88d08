//! A micro-batch on its way through the layers, in launches.

use checkpoint::Activation;

use super::ahead::{Ahead, Operand};
use super::{Batch, State, Step};
use crate::adapter::Lora;
use crate::attention::Attention;
use crate::device::{Device, args};
use crate::gemm::{Gemm, View};
use crate::generate::Cache;
use crate::weights::Direction::{Backward, Forward};
use crate::{CudaError, Dtype, Frozen};

/// One micro-batch in progress.
pub(crate) struct Pass<'a> {
    pub(crate) step: &'a Step,
    pub(crate) device: &'a Device,
    pub(crate) frozen: &'a Frozen,
    pub(crate) lora: &'a Lora,
    pub(crate) b: &'a Batch,
    /// Where keys and values go, and come from, in generation.
    pub(crate) cache: Option<&'a Cache>,
}

impl Pass<'_> {
    fn attention(&self, layer: usize, state: &State) -> Attention {
        let c = &self.frozen.config;
        let groups = &self.lora.groups[0];
        Attention {
            qkv: state.qkv.ptr(),
            ld: groups[0].outputs,
            out: state.attended.ptr(),
            ldo: groups[1].inputs + self.step.widths[1],
            lse: state.lse.ptr(),
            start: self.b.start,
            stop: self.b.stop,
            bounds: self.b.bounds,
            orders: self.b.orders,
            plan: self.step.attention,
            heads: c.num_attention_heads,
            kv_heads: c.num_key_value_heads,
            d: c.head_dim,
            n: self.b.n,
            longest: self.b.longest,
            scale: c.attention_scale(),
            softcap: c.variations.attn_logit_softcapping.unwrap_or(0.0),
            window: c.sliding_window(layer).unwrap_or(usize::MAX),
        }
    }

    /// Embedding and all layers forward.
    pub(crate) fn trunk(&self) -> Result<(), CudaError> {
        let (step, c) = (self.step, &self.frozen.config);
        let (table, tokens, out) = (self.frozen.embed.ptr(), self.b.tokens, step.residual(0));
        // transformers rounds the factor to the type of the embeddings.
        let factor = self.device.dtype.round(c.variations.embedding_scale.unwrap_or(1.0));
        let width = c.hidden_size as i32;
        // SAFETY: the table, the batch's tokens, and a residual stream.
        unsafe {
            let args = args![table, tokens, out, factor, width];
            self.device.launch(("layer.cu", "embed_rows"), [self.b.n, 1], 256, 0, args)?;
        }
        for layer in 0..c.num_hidden_layers {
            if let Some(offload) = &step.offload {
                offload.store(self.device, layer, &step.residual)?;
            }
            self.forward(layer, step.state(layer), true)?;
        }
        Ok(())
    }

    /// Layer forward; the product that leaves the layer only where `whole`.
    pub(super) fn forward(&self, layer: usize, s: &State, whole: bool) -> Result<(), CudaError> {
        let (h, w) = (self.frozen.config.hidden_size, self.step.widths);
        let input = self.step.residual(layer);
        let norm = self.frozen.input_norm(layer);
        self.norm(input, norm, (s.normed.ptr(), h + w[0]), s.roots[0].ptr())?;
        self.project((layer, 0), s.normed.ptr(), s.qkv.ptr(), 0)?;
        self.rope((s.qkv.ptr(), self.lora.groups[0][0].outputs), 1.0)?;
        let attention = self.attention(layer, s);
        match self.cache {
            None => attention.forward(self.device)?,
            Some(cache) => cache.attend(self.device, layer, &attention, self.b)?,
        }
        self.leave(layer, 0, s, (s.attended.ptr(), input), s.middle.ptr())?;
        let norm = self.frozen.feed_forward_norm(layer);
        let normed = (s.middle_normed.ptr(), h + w[2]);
        self.norm(s.middle.ptr(), norm, normed, s.roots[1].ptr())?;
        self.project((layer, 2), s.middle_normed.ptr(), s.gate_up.ptr(), 0)?;
        let ffn = self.frozen.config.intermediate_size;
        let (from, ldg) = (s.gate_up.ptr(), (2 * ffn + w[2]) as i32);
        let (to, ldy, width) = (s.activated.ptr(), (ffn + w[3]) as i32, ffn as i32);
        let rows = self.b.n as i32;
        // SAFETY: shapes of the state.
        unsafe {
            let kernel = ("layer.cu", self.activation("swiglu", "geglu"));
            let args = args![from, ldg, to, ldy, width, rows];
            self.device.launch(kernel, self.packs(ffn), 256, 0, args)?;
        }
        // The backward pass reads what the last norm reads, but not the sum, whose place may be taken.
        let out = if whole { self.step.residual(layer + 1) } else { 0 };
        if whole || s.outputs.is_some() {
            return self.leave(layer, 1, s, (s.activated.ptr(), s.middle.ptr()), out);
        }
        self.low_rank((layer, 3), s.activated.ptr())
    }

    /// `out = residual + y` for the output y, under its norm where it has one, of attention (block 0)
    /// or of the feed-forward block (1). `out` 0 is left out, where there is a norm.
    fn leave(
        &self,
        layer: usize,
        block: usize,
        s: &State,
        (x, residual): (u64, u64),
        out: u64,
    ) -> Result<(), CudaError> {
        let at = (layer, 2 * block + 1);
        let normed = s.outputs.as_ref().zip(self.frozen.output_norm(layer, block));
        let Some((outputs, norm)) = normed else { return self.project(at, x, out, residual) };
        let y = outputs[block].ptr();
        self.project(at, x, y, 0)?;
        let c = &self.frozen.config;
        let (root, width, eps) = (s.roots[2 + block].ptr(), c.hidden_size as i32, c.rms_norm_eps);
        // SAFETY: matrices of n rows.
        unsafe {
            let args = args![y, norm, residual, out, root, width, eps];
            let kernel = ("layer.cu", "rms_norm_add");
            self.device.launch(kernel, [self.b.n, 1], self.row_threads(), 0, args)
        }
    }

    /// Gradient of a block's output before its norm, from `dhidden`, which it is where there is none.
    fn enter(&self, layer: usize, block: usize, s: &State) -> Result<(u64, usize), CudaError> {
        let (step, w) = (self.step, self.step.widths);
        let ldh = self.frozen.config.hidden_size + w[1].max(w[3]);
        let dh = (step.dhidden.ptr(), ldh);
        let normed = s.outputs.as_ref().zip(self.frozen.output_norm(layer, block));
        let Some((outputs, norm)) = normed else { return Ok(dh) };
        // Free whenever a block is entered, once the sums over what it held are done.
        match block {
            0 => self.after_sums(layer, 3)?,
            _ if layer + 1 < self.frozen.config.num_hidden_layers => {
                self.after_sums(layer + 1, 0)?
            }
            _ => {}
        }
        let dy = (step.dqkv.ptr(), ldh);
        let (y, root) = (outputs[block].ptr(), s.roots[2 + block].ptr());
        self.norm_backward(y, norm, root, dh, dy, false)?;
        Ok(dy)
    }

    /// The kernel of the family's activation.
    fn activation(&self, silu: &'static str, gelu: &'static str) -> &'static str {
        match self.frozen.config.variations.activation {
            Activation::Silu => silu,
            Activation::GeluTanh => gelu,
        }
    }

    /// Turns `dhidden`, the gradient of the layer's output, into that of its input.
    pub(super) fn backward(&self, layer: usize, s: &State) -> Result<(), CudaError> {
        let (step, w) = (self.step, self.step.widths);
        let c = &self.frozen.config;
        let (hidden, ffn) = (c.hidden_size, c.intermediate_size);
        let (dh, ldh) = (step.dhidden.ptr(), hidden + w[1].max(w[3]));
        let dnormed = step.dnormed.ptr();
        let dy = self.enter(layer, 1, s)?;
        self.project_backward((layer, 3), dy, s.activated.ptr(), step.dactivated.ptr())?;
        let (gate_up, ldg, ldy) = (s.gate_up.ptr(), (2 * ffn + w[2]) as i32, ffn as i32);
        let (from, rows) = (step.dactivated.ptr(), self.b.n as i32);
        // SAFETY: shapes of the state; every thread reads what it overwrites.
        unsafe {
            let args = args![gate_up, ldg, from, ldy, gate_up, ldg, ldy, rows];
            let kernel = ("layer.cu", self.activation("swiglu_backward", "geglu_backward"));
            self.device.launch(kernel, self.packs(ffn), 256, 0, args)?;
        }
        let dy = (gate_up, 2 * ffn + w[2]);
        self.project_backward((layer, 2), dy, s.middle_normed.ptr(), dnormed)?;
        let (middle, root) = (s.middle.ptr(), s.roots[1].ptr());
        self.after_sums(layer, 3)?;
        let norm = self.frozen.feed_forward_norm(layer);
        self.norm_backward(middle, norm, root, (dnormed, hidden), (dh, ldh), true)?;
        let dy = self.enter(layer, 0, s)?;
        self.project_backward((layer, 1), dy, s.attended.ptr(), dnormed)?;
        let dqkv = (step.dqkv.ptr(), self.lora.groups[0][0].outputs + w[0]);
        let dout = (dnormed, self.lora.groups[0][1].inputs);
        if layer + 1 < c.num_hidden_layers {
            self.after_sums(layer + 1, 0)?;
        }
        if s.outputs.is_some() {
            self.after_sums(layer, 1)?;
        }
        // What the feed-forward block left is free by now.
        let scratch = (step.delta.ptr(), step.dactivated.ptr());
        self.attention(layer, s).backward(self.device, dout, dqkv, scratch)?;
        self.rope(dqkv, -1.0)?;
        // Nothing needs the gradient of the embeddings.
        let wanted = if layer > 0 { dnormed } else { 0 };
        self.project_backward((layer, 0), dqkv, s.normed.ptr(), wanted)?;
        if layer == 0 {
            return Ok(());
        }
        let (input, root) = (step.residual(layer), s.roots[0].ptr());
        self.after_sums(layer, 1)?;
        let norm = self.frozen.input_norm(layer);
        self.norm_backward(input, norm, root, (dnormed, hidden), (dh, ldh), true)
    }

    /// Grid of a kernel that takes 16 bytes of a row of `width` elements a thread.
    fn packs(&self, width: usize) -> [usize; 2] {
        let vector = 16 / self.device.dtype.size() as usize;
        [(self.b.n * width / vector).div_ceil(256), 1]
    }

    fn norm(&self, x: u64, w: u64, y: (u64, usize), roots: u64) -> Result<(), CudaError> {
        self.norm_rows(x, w, y, roots, self.b.n)
    }

    pub(crate) fn norm_rows(
        &self,
        x: u64,
        w: u64,
        (y, ldy): (u64, usize),
        roots: u64,
        rows: usize,
    ) -> Result<(), CudaError> {
        let [width, ldy] = [self.frozen.config.hidden_size, ldy].map(|v| v as i32);
        let eps = self.frozen.config.rms_norm_eps;
        // SAFETY: matrices of `rows` rows.
        unsafe {
            let args = args![x, width, w, y, ldy, roots, width, eps];
            self.device.launch(("layer.cu", "rms_norm"), [rows, 1], self.row_threads(), 0, args)
        }
    }

    /// The gradient `dy` through a norm, added to `dx` or in its place.
    fn norm_backward(
        &self,
        x: u64,
        w: u64,
        roots: u64,
        (dy, lddy): (u64, usize),
        (dx, lddx): (u64, usize),
        add: bool,
    ) -> Result<(), CudaError> {
        let [width, lddy, lddx] = [self.frozen.config.hidden_size, lddy, lddx].map(|v| v as i32);
        let add = i32::from(add);
        // SAFETY: matrices of n rows.
        unsafe {
            let args = args![x, width, w, roots, dy, lddy, dx, lddx, width, add];
            let kernel = ("layer.cu", "rms_norm_backward");
            self.device.launch(kernel, [self.b.n, 1], self.row_threads(), 0, args)
        }
    }

    /// Threads of a block that takes a row of the residual stream, 16 bytes a thread: whole warps, and
    /// one round where that takes no more than twice the usual 256.
    pub(super) fn row_threads(&self) -> usize {
        let vector = 16 / self.device.dtype.size() as usize;
        match self.frozen.config.hidden_size / vector {
            packs @ 257..=512 => packs.next_multiple_of(32),
            _ => 256,
        }
    }

    /// Rotates queries and keys.
    fn rope(&self, (x, ld): (u64, usize), sign: f32) -> Result<(), CudaError> {
        let c = &self.frozen.config;
        let heads = c.num_attention_heads + c.num_key_value_heads;
        let vector = 16 / self.device.dtype.size() as usize;
        let packs = self.b.n * heads * c.head_dim / 2 / vector;
        let [ld, heads, d, rows] = [ld, heads, c.head_dim, self.b.n].map(|v| v as i32);
        let (positions, cosines) = (self.b.positions, self.step.cosines.ptr());
        let sines = self.step.sines.ptr();
        // SAFETY: tables cover the capacity, which bounds positions.
        unsafe {
            let args = args![x, ld, heads, d, positions, cosines, sines, sign, rows];
            self.device.launch(("layer.cu", "rope"), [packs.div_ceil(256), 1], 256, 0, args)
        }
    }

    /// `u = s x Aᵀ` into the extra columns of `x`.
    fn low_rank(&self, (layer, index): (usize, usize), x: u64) -> Result<(), CudaError> {
        let g = self.lora.groups[layer][index];
        if g.width == 0 {
            return Ok(());
        }
        let (n, ld, size) = (self.b.n, g.inputs + g.width, self.device.dtype.size());
        let a = View::new(self.lora.operand(g.a), g.inputs);
        let u = View::new(x + g.inputs as u64 * size, ld);
        let product = Gemm::new((n, g.width, g.inputs), View::new(x, ld), a.t(), u);
        self.device.gemm("lora u", Gemm { alpha: self.lora.scale, ..product })
    }

    /// `y = [x, u] [W, B]ᵀ + bias`, plus `residual` where it is not 0. What leaves a block is of the
    /// residual stream's type.
    fn project(
        &self,
        at @ (layer, index): (usize, usize),
        x: u64,
        y: u64,
        residual: u64,
    ) -> Result<(), CudaError> {
        let g = self.lora.groups[layer][index];
        self.low_rank(at, x)?;
        let k = g.row();
        let operand = self.operand(Operand { layer, group: index, direction: Forward })?;
        // Gate and up leave room for the gradient's low-rank columns.
        let ldy = g.outputs + if index == 2 { g.width } else { 0 };
        let (x, w) = (View::new(x, k), View::new(operand, k).t());
        let mut product = Gemm::new((self.b.n, g.outputs, k), x, w, View::new(y, ldy));
        product.bias = self.frozen.bias(layer, index);
        product.f32_out = matches!(index, 1 | 3) && self.device.dtype.residual() == Dtype::F32;
        if residual != 0 {
            (product.beta, product.c) = (1.0, residual);
        }
        self.device.gemm("gemm forward", product)
    }

    /// Lanes beside the main stream; a profile wants one thing at a time.
    fn ahead(&self) -> Option<&Ahead> {
        self.step.ahead.as_ref().filter(|_| !self.device.is_profiling())
    }

    /// Address of a decoded operand.
    fn operand(&self, wanted: Operand) -> Result<u64, CudaError> {
        let at = (wanted.layer, wanted.group);
        if let Some(kept) = self.step.resident.as_ref().and_then(|r| r.operand(self.frozen, at)) {
            return Ok(kept);
        }
        let decode = |o: Operand, to: u64| {
            let at = (o.layer, o.group);
            self.frozen.decode(self.device, at, self.lora, to)?;
            self.lora.put(self.device, at, o.direction, to)
        };
        let layers = self.frozen.config.num_hidden_layers;
        match self.ahead() {
            Some(ahead) => ahead.operand(self.device, wanted, layers, decode),
            None => {
                let scratch = self.step.scratch.ptr();
                decode(wanted, scratch)?;
                Ok(scratch)
            }
        }
    }

    /// Waits for the sums of a group of `layer` before what they read is written.
    fn after_sums(&self, layer: usize, group: usize) -> Result<(), CudaError> {
        match self.ahead() {
            Some(ahead) if self.lora.groups[layer][group].width > 0 => {
                ahead.wait_for_sums(self.device, group)
            }
            _ => Ok(()),
        }
    }

    /// Has the main stream wait for the operand that is decoded ahead, which nothing may need.
    pub(super) fn settle(&self) -> Result<(), CudaError> {
        self.ahead().map_or(Ok(()), |ahead| ahead.settle(self.device).map(|_| ()))
    }

    /// Ends a step: the main stream has waited for everything beside it.
    pub(super) fn join(&self) -> Result<(), CudaError> {
        self.settle()?;
        (0..4).try_for_each(|group| self.after_sums(0, group))
    }

    /// Gradients of the group's factors from `dy`, and `dx = [dy, du] [W; A]` where `dx` is not 0.
    fn project_backward(
        &self,
        (layer, index): (usize, usize),
        (dy, lddy): (u64, usize),
        x: u64,
        dx: u64,
    ) -> Result<(), CudaError> {
        let g = self.lora.groups[layer][index];
        let (n, size) = (self.b.n, self.device.dtype.size());
        let (gradient, ldx) = (View::new(dy, lddy), g.row());
        if g.width > 0 {
            let du = View::new(dy + g.outputs as u64 * size, lddy);
            let b = View::new(self.lora.operand(g.b), g.width);
            let product = Gemm::new((n, g.width, g.outputs), gradient, b, du);
            self.device.gemm("lora du", Gemm { alpha: self.lora.scale, ..product })?;
            let sums = || {
                let u = View::new(x + g.inputs as u64 * size, ldx);
                let db = View::new(self.lora.gradient(g.b), g.width);
                let product = Gemm::new((g.outputs, g.width, n), gradient.t(), u, db);
                self.device.gemm("lora dB", Gemm { beta: 1.0, f32_out: true, ..product })?;
                let da = View::new(self.lora.gradient(g.a), g.inputs);
                let product = Gemm::new((g.width, g.inputs, n), du.t(), View::new(x, ldx), da);
                self.device.gemm("lora dA", Gemm { beta: 1.0, f32_out: true, ..product })
            };
            match self.ahead() {
                Some(ahead) => ahead.sum(self.device, index, sums)?,
                None => sums()?,
            }
        }
        if dx == 0 {
            return Ok(());
        }
        let operand = self.operand(Operand { layer, group: index, direction: Backward })?;
        let (k, w) = (g.outputs + g.width, View::new(operand, g.row()));
        let product = Gemm::new((n, g.inputs, k), gradient, w, View::new(dx, g.inputs));
        self.device.gemm("gemm backward", product)
    }
}

/// `out[i] = stream[index[i]]`, in the type of the residual stream.
pub(crate) fn gather(
    device: &Device,
    (stream, width): (u64, usize),
    index: u64,
    out: u64,
    rows: usize,
) -> Result<(), CudaError> {
    let width = width as i32;
    // SAFETY: the caller's matrices and indices.
    unsafe {
        let args = args![stream, index, out, width];
        device.launch(("layer.cu", "gather_rows"), [rows, 1], 256, 0, args)
    }
}
