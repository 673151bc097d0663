package expiration

import (
	"runtime"
	"unsafe"
)

// region is memory for values without pointers, which are zero at first. If it is large, it is no part of Go's heap: the
// garbage collector lets a heap grow to twice of what is in use, and a million timers would take the room of two.
type region[T any] struct {
	values  []T
	mapped  []byte // nil if it is part of the heap
	cleanup runtime.Cleanup
}

// onHeap is up to how many bytes a region is part of the heap.
const onHeap = 1 << 20

func newRegion[T any](n int) *region[T] {
	r := &region[T]{}
	if size := n * int(unsafe.Sizeof(*new(T))); size > onHeap {
		r.mapped = mapMemory(size)
	}
	if r.mapped == nil {
		r.values = make([]T, n)
		return r
	}
	r.values = unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(r.mapped))), n)
	r.cleanup = runtime.AddCleanup(r, unmapMemory, r.mapped)
	return r
}

// release gives the memory back. A region that nobody refers to any more is released without it; who holds a pointer to a
// value must see to it that somebody holds the region.
func (r *region[T]) release() {
	if r.mapped != nil {
		r.cleanup.Stop()
		unmapMemory(r.mapped)
	}
	*r = region[T]{}
}
