//! The LoRA adapter on the device: f32 masters, operands of the products, gradients.

use std::cell::Cell;

use checkpoint::ModelConfig;
use model::Adapter;

use crate::CudaError;
use crate::device::{Buffer, Device, args};
use crate::weights::{Direction, copy_columns};

/// Group of each projection in the order of `model::PROJECTIONS`: those of a group read the same
/// input, and their factors are merged into one pair of operands.
pub(crate) const GROUP_OF: [usize; 7] = [0, 0, 0, 1, 2, 2, 3];

/// The merged factors of one group: `A [width, in]`, and `B [out, width]` with each projection's
/// factor in its own rows and columns and zeros elsewhere.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Group {
    /// Ranks of the adapted projections together, rounded up to 8; 0 where none is adapted.
    pub(crate) width: usize,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    /// Offsets in elements into operands and their gradients.
    pub(crate) a: u64,
    pub(crate) b: u64,
}

impl Group {
    /// Elements of a row of the operands, which carry B in their last columns.
    pub(crate) fn row(&self) -> usize {
        self.inputs + self.width
    }
}

/// An adapter on the device.
pub struct Lora {
    /// Factors one after another, as in `model::Adapter::values`, f32.
    pub(crate) values: Buffer,
    pub(crate) count: usize,
    pub(crate) groups: Vec<[Group; 4]>,
    pub(crate) scale: f32,
    operands: Buffer,
    /// How often the operands were made.
    changes: Cell<u64>,
    gradients: Buffer,
    table: Buffer,
    factors: usize,
    element: u64,
}

/// `(in, out)` features of a group.
pub(crate) fn group_shape(c: &ModelConfig, group: usize) -> (usize, usize) {
    let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
    let (hidden, ffn) = (c.hidden_size, c.intermediate_size);
    [(hidden, q + 2 * kv), (q, hidden), (hidden, 2 * ffn), (ffn, hidden)][group]
}

/// First output row of a projection inside its group.
pub(crate) fn first_row(c: &ModelConfig, projection: usize) -> usize {
    let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
    [0, q, q + kv, 0, 0, c.intermediate_size, 0][projection]
}

impl Lora {
    /// Uploads an adapter.
    ///
    /// # Errors
    /// [`CudaError`] where memory runs out, or for an adapter with DoRA.
    pub fn new(
        device: &Device,
        config: &ModelConfig,
        adapter: &Adapter,
    ) -> Result<Self, CudaError> {
        if adapter.config.use_dora {
            return Err(CudaError::Input(
                "an adapter with DoRA cannot run on a GPU yet".to_owned(),
            ));
        }
        let r = adapter.config.r;
        let mut groups = vec![[Group::default(); 4]; config.num_hidden_layers];
        let mut end = 0u64;
        let mut take = |count: usize| {
            let start = end;
            end = (end + count as u64).next_multiple_of(128);
            start
        };
        for (layer, groups) in groups.iter_mut().enumerate() {
            for (index, group) in groups.iter_mut().enumerate() {
                let of_group =
                    |f: &&model::Factor| f.layer == layer && GROUP_OF[f.projection] == index;
                let members = adapter.factors.iter().filter(of_group).count();
                (group.inputs, group.outputs) = group_shape(config, index);
                group.width = (members * r).next_multiple_of(8);
                group.a = take(group.width * group.inputs);
                group.b = take(group.width * group.outputs);
            }
        }
        let mut table: Vec<u8> = Vec::new();
        let mut columns = vec![[0usize; 4]; groups.len()];
        let mut entry =
            |values: usize, operand: u64, rows: usize, columns: usize, stride: usize| {
                table.extend((values as u64).to_le_bytes());
                table.extend(operand.to_le_bytes());
                for number in [rows, columns, stride, 0] {
                    table.extend((number as i32).to_le_bytes());
                }
            };
        for f in &adapter.factors {
            let index = GROUP_OF[f.projection];
            let group = &groups[f.layer][index];
            let column = &mut columns[f.layer][index];
            let row = first_row(config, f.projection);
            entry(f.a.start, group.a + (*column * f.inputs) as u64, r, f.inputs, f.inputs);
            let b = group.b + (row * group.width + *column) as u64;
            entry(f.b.start, b, f.outputs, r, group.width);
            *column += r;
        }
        let element = device.dtype.size();
        let lora = Self {
            values: device.upload_f32(&adapter.values)?,
            count: adapter.values.len(),
            scale: adapter.scale(),
            operands: device.zeros(end * element)?,
            changes: Cell::new(0),
            gradients: device.zeros(end * 4)?,
            table: device.upload(&table)?,
            factors: adapter.factors.len() * 2,
            groups,
            element,
        };
        lora.refresh(device)?;
        Ok(lora)
    }

    /// Address of operand elements.
    pub(crate) fn operand(&self, offset: u64) -> u64 {
        self.operands.ptr() + offset * self.element
    }

    /// Address of the gradient of operand elements, f32.
    pub(crate) fn gradient(&self, offset: u64) -> u64 {
        self.gradients.ptr() + offset * 4
    }

    /// A number that changes with the operands.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.get()
    }

    /// Puts the group's factors beside the weights in an operand of rows of [`Group::row`]: B after its
    /// columns, or A after its rows.
    pub(crate) fn put(
        &self,
        device: &Device,
        (layer, index): (usize, usize),
        direction: Direction,
        operand: u64,
    ) -> Result<(), CudaError> {
        let group = self.groups[layer][index];
        let Group { width, inputs, outputs, a, b } = group;
        let (from, columns, rows, first) = match direction {
            Direction::Forward => (b, width, outputs, inputs),
            Direction::Backward => (a, inputs, width, outputs * group.row()),
        };
        if width == 0 {
            return Ok(());
        }
        let to = operand + first as u64 * self.element;
        copy_columns(device, (self.operand(from), columns), (to, group.row()), columns, rows)
    }

    /// Rounds the masters to operands; after every change of the masters.
    pub(crate) fn refresh(&self, device: &Device) -> Result<(), CudaError> {
        let (values, operands) = (self.values.ptr(), self.operands.ptr());
        let table = self.table.ptr();
        self.changes.set(self.changes.get() + 1);
        let kernel = ("optimizer.cu", "to_operands");
        // SAFETY: the table was made for these buffers.
        unsafe { device.launch(kernel, [32, self.factors], 256, 0, args![values, operands, table]) }
    }

    /// Replaces the masters.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn write_values(&mut self, device: &Device, values: &[f32]) -> Result<(), CudaError> {
        if values.len() != self.count {
            let message = format!("{} values where the adapter has {}", values.len(), self.count);
            return Err(CudaError::Input(message));
        }
        device.write(self.values.ptr(), &crate::Dtype::F32.encode(values))?;
        self.refresh(device)
    }

    /// Zeroes the gradient.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn zero_grad(&self, device: &Device) -> Result<(), CudaError> {
        device.clear(self.gradients.ptr(), self.gradients.bytes())
    }

    /// Lays the gradient out as the masters are, f32, at `to`.
    pub(crate) fn collect(&self, device: &Device, to: u64) -> Result<(), CudaError> {
        let (gradients, table) = (self.gradients.ptr(), self.table.ptr());
        let kernel = ("optimizer.cu", "from_operands");
        // SAFETY: the table was made for these buffers.
        unsafe { device.launch(kernel, [32, self.factors], 256, 0, args![gradients, to, table]) }
    }

    /// The gradient in the layout of `model::Adapter::values`.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn read_gradient(&self, device: &Device) -> Result<Vec<f32>, CudaError> {
        let flat = device.zeros(self.count as u64 * 4)?;
        self.collect(device, flat.ptr())?;
        device.read_f32(&flat, self.count)
    }

    /// Replaces the gradient by one in that layout: for checks of the optimiser.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn write_gradient(&self, device: &Device, gradient: &[f32]) -> Result<(), CudaError> {
        if gradient.len() != self.count {
            let message = format!("{} values where the adapter has {}", gradient.len(), self.count);
            return Err(CudaError::Input(message));
        }
        let flat = device.upload_f32(gradient)?;
        let (from, gradients, table) = (flat.ptr(), self.gradients.ptr(), self.table.ptr());
        let kernel = ("optimizer.cu", "to_gradients");
        // SAFETY: the table was made for these buffers.
        unsafe {
            device.launch(kernel, [32, self.factors], 256, 0, args![from, gradients, table])?;
        }
        device.synchronize()
    }

    /// The masters.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn read_values(&self, device: &Device) -> Result<Vec<f32>, CudaError> {
        device.read_f32(&self.values, self.count)
    }
}
