//! temporary
use std::collections::BTreeMap;
use std::path::Path;
use crate::CheckpointError;
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgmlType { F32, F16, Bf16, Q4_0, Q4_1, Q8_0, Other(u32) }
pub struct TensorInfo { pub dtype: GgmlType, pub shape: Vec<u64>, pub offset: usize, pub bytes: usize }
enum V { U(u64), F(f32), S(String), O }
pub struct Gguf { meta: BTreeMap<String, V>, tensors: BTreeMap<String, TensorInfo>, data: Vec<u8> }
impl Gguf {
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let d = std::fs::read(path).unwrap();
        let mut p = 8usize;
        fn u64_(d:&[u8],p:&mut usize)->u64{ let v=u64::from_le_bytes(d[*p..*p+8].try_into().unwrap()); *p+=8; v }
        fn u32_(d:&[u8],p:&mut usize)->u32{ let v=u32::from_le_bytes(d[*p..*p+4].try_into().unwrap()); *p+=4; v }
        fn s_(d:&[u8],p:&mut usize)->String{ let n=u64_(d,p) as usize; let v=String::from_utf8_lossy(&d[*p..*p+n]).into_owned(); *p+=n; v }
        fn val(d:&[u8],p:&mut usize,t:u32)->V{ match t { 0|1|7=>{*p+=1;V::U(d[*p-1] as u64)} 2|3=>{*p+=2;V::O} 4|5=>V::U(u32_(d,p) as u64), 6=>V::F(f32::from_bits(u32_(d,p))), 8=>V::S(s_(d,p)), 9=>{let et=u32_(d,p); let n=u64_(d,p); for _ in 0..n{val(d,p,et);} V::O} 10|11=>V::U(u64_(d,p)), _=>{*p+=8;V::O} } }
        let nt = u64_(&d,&mut p); let nk = u64_(&d,&mut p);
        let mut meta = BTreeMap::new();
        for _ in 0..nk { let k=s_(&d,&mut p); let t=u32_(&d,&mut p); let v=val(&d,&mut p,t); meta.insert(k,v); }
        let mut tensors=BTreeMap::new();
        for _ in 0..nt { let k=s_(&d,&mut p); let n=u32_(&d,&mut p); let mut shape:Vec<u64>=(0..n).map(|_|u64_(&d,&mut p)).collect(); shape.reverse(); let t=u32_(&d,&mut p); let offset=u64_(&d,&mut p) as usize;
            let (dtype,bs,bb)=match t {0=>(GgmlType::F32,1,4),1=>(GgmlType::F16,1,2),30=>(GgmlType::Bf16,1,2),2=>(GgmlType::Q4_0,32,18),3=>(GgmlType::Q4_1,32,20),8=>(GgmlType::Q8_0,32,34),o=>(GgmlType::Other(o),1,1)};
            let bytes=shape.iter().product::<u64>() as usize/bs*bb; tensors.insert(k,TensorInfo{dtype,shape,offset,bytes}); }
        let base=(p+31)/32*32;
        for t in tensors.values_mut(){ t.offset+=base; }
        Ok(Self{meta,tensors,data:d})
    }
    pub fn u64(&self,k:&str)->Option<u64>{ match self.meta.get(k){Some(V::U(v))=>Some(*v),_=>None} }
    pub fn f32(&self,k:&str)->Option<f32>{ match self.meta.get(k){Some(V::F(v))=>Some(*v),_=>None} }
    pub fn str(&self,k:&str)->Option<&str>{ match self.meta.get(k){Some(V::S(v))=>Some(v),_=>None} }
    pub fn tensor(&self,k:&str)->Option<&TensorInfo>{ self.tensors.get(k) }
    pub fn tensor_data(&self,k:&str)->Result<&[u8],CheckpointError>{ let t=&self.tensors[k]; Ok(&self.data[t.offset..t.offset+t.bytes]) }
}
