package expiration

import (
	"cmp"
	"container/heap"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Some turns of a room may begin before the one before is over. Two events that are built beside one another are joined by the next:
// for that Dendrite goes through all state of the room, which takes long where there is much of it, but writes it anew as one piece.
// Where nothing is ever joined, it asks for up to 64 pieces each time it looks at the state. So of a burst the second turn is early,
// and then any until one was built beside the one before, as one in earlyLeast is to be, or, in rooms where so much waits that there must
// be much state, one in earlyEvery at the most. One in two would be all: what is built beside the one that joins two joins them as well.
// See docs/performance.md, "Mass expiry".
const (
	earlyLeast = 4
	earlyEvery = 8
)

// turnsPerRoom is how many turns of a room there can be at the same time.
const turnsPerRoom = 2

// lanes hands due timers to workers: for each room in the order of their deadlines, and one at a time, but that now and then a
// turn can begin before the one before is over, see earlyEvery and turn. Of the rooms whose next timer may have its turn, the one with the
// earliest deadline is served first, so a slow room holds up nobody but itself.
type lanes struct {
	mu      sync.Mutex // guards everything below; a leaf, see the lock order in doc.go
	changed *sync.Cond
	rooms   map[uint64]*lane // the rooms that have timers waiting or in work
	ready   laneHeap         // those that have one waiting, which may have its turn, and none in work
	early   laneHeap         // those that have one waiting, which may have its turn early
	free    int              // how many more rooms may have timers in work
	stopped bool

	earlyEvery int // is the constant, but for tests
}

// lane is one room's waiting timers.
type lane struct {
	room    uint64 // its hash
	waiting []waiting
	busy    bool          // the next one may not have its turn yet
	early   bool          // it is in lanes.early
	working int           // how many have theirs, turnsPerRoom at the most
	last    chan struct{} // closed when the turn that began last is over, and all before it
	eventID string        // of the event that was built last
	alone   int           // how many were built since the last one that was built beside the one before
}

// turn is the turn of a timer in its room's lane. Whoever closes an event otherwise has none, and waits for nobody. Its worker owns it.
type turn struct {
	lanes    *lanes
	room     *lane
	before   <-chan struct{} // closed when the turn before is over
	early    bool            // it began before that
	released bool            // the room's next timer may have its turn
}

// follow is called when the turn's event is built, and waits until the turn before is over. Then the turn of the room's next timer can
// begin, if it may be early for both the lane and the caller, and else when this one's is over.
func (w *turn) follow(ctx context.Context, e SignedEvent, early bool) error {
	if w == nil {
		return nil
	}
	select {
	case <-w.before:
	case <-ctx.Done():
		return fmt.Errorf("waiting for the room's event before: %w", ctx.Err())
	}
	w.lanes.mu.Lock()
	defer w.lanes.mu.Unlock()
	if w.room.alone++; w.early && !e.isUpon(w.room.eventID) {
		w.room.alone = 0
	}
	w.room.eventID = e.EventID
	if early && w.room.alone+1 >= w.lanes.spacing(len(w.room.waiting)) {
		w.release()
	}
	return nil
}

// release lets the room's next timer have its turn, once. lanes.mu is held.
func (w *turn) release() {
	if !w.released {
		w.released = true
		w.room.busy = false
		if len(w.room.waiting) > 0 {
			w.lanes.offer(w.room)
		}
	}
}

// waiting is a timer with its deadline as it was when it became due: the order must not change under the heap.
type waiting struct {
	timer ref
	due   time.Duration
}

// over is a turn that is over.
var over = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// newLanes returns lanes for workers that serve so many rooms at the same time. There are to be turnsPerRoom
// workers for each of them, so that an early turn always finds one.
func newLanes(rooms int) *lanes {
	l := &lanes{rooms: map[uint64]*lane{}, free: rooms, earlyEvery: earlyEvery}
	l.changed = sync.NewCond(&l.mu)
	return l
}

// add puts a timer into its room's lane.
func (l *lanes) add(r ref, inRoom uint64, due time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	room := l.rooms[inRoom]
	if room == nil {
		room = &lane{room: inRoom, last: over, alone: l.earlyEvery}
		l.rooms[inRoom] = room
	}
	at, _ := slices.BinarySearchFunc(room.waiting, due, func(w waiting, due time.Duration) int {
		return cmp.Or(cmp.Compare(w.due, due), -1) // behind those with the same deadline
	})
	room.waiting = slices.Insert(room.waiting, at, waiting{r, due})
	switch {
	case room.busy:
	case len(room.waiting) == 1:
		l.offer(room)
	case at == 0: // the room's place may have changed; rare, as timers mostly come in order
		heap.Init(&l.ready)
		heap.Init(&l.early)
	}
}

// offer lets workers take the room's next timer. lanes.mu is held.
func (l *lanes) offer(room *lane) {
	if room.early = room.working > 0; room.early {
		heap.Push(&l.early, room)
	} else {
		heap.Push(&l.ready, room)
	}
	l.changed.Signal()
}

// take returns the room that is to be served next, or nil if there is none. lanes.mu is held.
func (l *lanes) take() *lane {
	switch {
	case len(l.early) > 0:
		room := heap.Pop(&l.early).(*lane)
		room.early = false
		return room
	case len(l.ready) > 0 && l.free > 0:
		l.free--
		return heap.Pop(&l.ready).(*lane)
	}
	return nil
}

// work takes timers and calls f with them until stop is called.
func (l *lanes) work(f func(r ref, w *turn)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.stopped {
		room := l.take()
		if room == nil {
			l.changed.Wait()
			continue
		}
		r := room.waiting[0].timer
		room.waiting = slices.Delete(room.waiting, 0, 1)
		before, done := room.last, make(chan struct{})
		room.busy, room.last = true, done
		w := &turn{lanes: l, room: room, before: before, early: room.working > 0}
		room.working++
		l.mu.Unlock()
		f(r, w)
		<-before
		close(done)
		l.mu.Lock()
		l.leave(room)
		w.release()
		if room.working == 0 && len(room.waiting) == 0 {
			delete(l.rooms, room.room)
		}
	}
}

// spacing returns how many turns come to one whose event is built beside another, in a room where so many wait: what waits is what is known
// of how much state the room has, and as many as earlyEvery times earlyEvery are much.
func (l *lanes) spacing(waiting int) int {
	return min(max(waiting/earlyEvery, earlyLeast), l.earlyEvery)
}

// leave ends a turn. If the room has no other, not even an early one that is about to begin, another room can be served. lanes.mu is
// held.
func (l *lanes) leave(room *lane) {
	room.working--
	if room.working == 0 && !room.early {
		l.free++
		l.changed.Signal()
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
