//! Types of what lies on a device.

/// Type of weights and activations; all arithmetic accumulates in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 32-bit floats, without tensor-float truncation.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit floats.
    F16,
}

impl Dtype {
    /// Bytes of an element.
    pub fn size(self) -> u64 {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Value of the macro ELEMENT of the kernels.
    pub(crate) fn element(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::Bf16 => 1,
            Self::F16 => 2,
        }
    }

    /// Type of the residual stream beside this one: f16 has too little range for it.
    pub(crate) fn residual(self) -> Self {
        if self == Self::F16 { Self::F32 } else { self }
    }

    /// `value` rounded to this type.
    pub(crate) fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => half::bf16::from_f32(value).to_f32(),
            Self::F16 => half::f16::from_f32(value).to_f32(),
        }
    }

    /// The values of elements of this type.
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let pairs = bytes.as_chunks::<2>().0.iter();
        match self {
            Self::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Self::Bf16 => pairs.map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
            Self::F16 => pairs.map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        }
    }

    /// The bytes of `values` in this type.
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        let mut out = vec![0; values.len() * self.size() as usize];
        self.encode_into(values, &mut out);
        out
    }

    /// Writes the bytes of `values` in this type to `out`, which has room for them.
    pub(crate) fn encode_into(self, values: &[f32], out: &mut [u8]) {
        match self {
            Self::F32 => {
                let places = out.as_chunks_mut().0.iter_mut();
                values.iter().zip(places).for_each(|(v, to)| *to = v.to_le_bytes());
            }
            Self::Bf16 | Self::F16 => {
                let bits = |v: f32| match self {
                    Self::Bf16 => half::bf16::from_f32(v).to_le_bytes(),
                    _ => half::f16::from_f32(v).to_le_bytes(),
                };
                let places = out.as_chunks_mut().0.iter_mut();
                values.iter().zip(places).for_each(|(v, to)| *to = bits(*v));
            }
        }
    }
}
