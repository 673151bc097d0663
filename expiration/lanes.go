package expiration

import (
	"cmp"
	"container/heap"
	"slices"
	"sync"
	"time"
)

// lanes hands due timers to workers: one at a time for each room, in the order of their deadlines. Of the rooms that
// have none in work, the one with the earliest deadline is served first, so a slow room holds up nobody but itself.
type lanes struct {
	mu      sync.Mutex // guards everything below; a leaf, see the lock order in doc.go
	changed *sync.Cond
	rooms   map[uint64]*lane // the rooms that have timers waiting or in work
	ready   laneHeap         // those that have one waiting and none in work
	stopped bool
}

// lane is one room's waiting timers.
type lane struct {
	room    uint64 // its hash
	waiting []waiting
	busy    bool
}

// waiting is a timer with its deadline as it was when it became due: the order must not change under the heap.
type waiting struct {
	timer ref
	due   time.Duration
}

func newLanes() *lanes {
	l := &lanes{rooms: map[uint64]*lane{}}
	l.changed = sync.NewCond(&l.mu)
	return l
}

// add puts a timer into its room's lane.
func (l *lanes) add(r ref, inRoom uint64, due time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	room := l.rooms[inRoom]
	if room == nil {
		room = &lane{room: inRoom}
		l.rooms[inRoom] = room
	}
	at, _ := slices.BinarySearchFunc(room.waiting, due, func(w waiting, due time.Duration) int {
		return cmp.Or(cmp.Compare(w.due, due), -1) // behind those with the same deadline
	})
	room.waiting = slices.Insert(room.waiting, at, waiting{r, due})
	if !room.busy {
		if len(room.waiting) == 1 {
			heap.Push(&l.ready, room)
		} else if at == 0 {
			heap.Init(&l.ready) // the room's place may have changed; rare, as timers mostly come in order
		}
		l.changed.Signal()
	}
}

// work takes timers and calls f with them until stop is called, and with the one that is the room's next as it seems, if there
// is one.
func (l *lanes) work(f func(r, next ref)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		for len(l.ready) == 0 && !l.stopped {
			l.changed.Wait()
		}
		if l.stopped {
			return
		}
		room := heap.Pop(&l.ready).(*lane)
		r := room.waiting[0].timer
		room.waiting = slices.Delete(room.waiting, 0, 1)
		room.busy = true
		var next ref
		if len(room.waiting) > 0 {
			next = room.waiting[0].timer
		}
		l.mu.Unlock()
		f(r, next)
		l.mu.Lock()
		room.busy = false
		if len(room.waiting) > 0 {
			heap.Push(&l.ready, room)
			l.changed.Signal()
		} else {
			delete(l.rooms, room.room)
		}
	}
}

// stop lets the workers return. What waits is left waiting.
func (l *lanes) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
	l.changed.Broadcast()
}

// laneHeap has the lane with the earliest deadline in front.
type laneHeap []*lane

func (h laneHeap) Len() int           { return len(h) }
func (h laneHeap) Less(i, j int) bool { return h[i].waiting[0].due < h[j].waiting[0].due }
func (h laneHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *laneHeap) Push(x any)        { *h = append(*h, x.(*lane)) }
func (h *laneHeap) Pop() any {
	last := len(*h) - 1
	room := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return room
}
