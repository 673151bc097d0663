// Package lanes decides in which order overdue timers are attempted, and how many at a time.
//
// It guarantees:
//
//   - Order. The first attempts of one room run in the order of their deadlines. At most two of them overlap, see [Turn.Follow].
//   - Isolation. An attempt that hangs takes little from others: every class of attempts, every sender and every room has a bound on what
//     is in progress at the same time. The bounds are constants in places.go.
//   - Progress. A job that was added is attempted unless [Lanes.Stop] was called first. A panic in an attempt ends only its turn.
//
// The package knows no timers, only jobs with a room, a sender and a deadline.
package lanes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
)

// Some turns of a room may begin before the one before is over. Two events that are built beside one another are joined by the next:
// for that Dendrite goes through all state of the room, which takes long where there is much of it, but writes it anew as one piece.
// Where nothing is ever joined, it asks for up to 64 pieces each time it looks at the state. So of a burst the second turn is early,
// and then any until one was built beside the one before, as one in earlyLeast is to be, or, in rooms where so much waits that there must
// be much state, one in EarlyEvery at the most. One in two would be all: what is built beside the one that joins two joins them as well.
// See docs/performance.md, "Mass expiry".
const (
	earlyLeast = 4
	EarlyEvery = 8
)

// turnsPerRoom is how many turns of a room there can be at the same time.
const turnsPerRoom = 2

// Lanes decides when each due timer is attempted, and runs the attempts. It is built so that attempts that hang take little from
// others; its bounds stand in places.go.
//
//   - The first attempts of a room come in the order of the deadlines, and one at a time, but that now and then a turn can begin
//     before the one before is over, see EarlyEvery and Turn. Of the rooms that wait, the one with the earliest deadline is next.
//   - A first attempt that overruns PlacePatience gives its place to another room. Its own room still waits for it.
//   - A sender has few places when others need them.
//   - Retries have few places of their own, which the senders get in turns. In a room they come after the first attempts. The timers
//     of a sender whose attempt hung count as retries for a while, wherever they are: that is what the attempts of all of them may do.
type Lanes struct {
	working sync.WaitGroup // the turns; after Stop there are no new ones

	mu       sync.Mutex       // guards everything below; a leaf, see the lock order in expiration/doc.go
	rooms    map[uint64]*lane // the rooms that have timers waiting or in work
	first    class
	retries  class
	overtime int                  // how many rooms are in progress without a place
	hung     map[uint64]time.Time // until when the timers of these senders count as retries
	stopped  bool

	earlyEvery int
}

// lane is one room's due timers.
type lane struct {
	room    uint64 // its hash
	first   queue  // first attempts
	retries queue
	turns   []*Turn       // in progress, the oldest first; turnsPerRoom at the most
	class   *class        // whose place the room has, or had before it overran
	placed  bool          // it has it
	holder  *sender       // whom the place is counted for: the sender of the oldest turn
	busy    bool          // the next one may not have its turn yet
	passed  int           // how many first attempts there were while a retry waited
	last    chan struct{} // closed when the turn that began last is over, and all before it
	eventID string        // of the event that was built last
	alone   int           // how many were built since the last one that was built beside the one before
}

// queue is a room's timers that wait in one class, in the order of their deadlines.
type queue struct {
	lane    *lane
	waiting []Job
	offered *sender // in whose heap the queue is, or nil
	ticket  uint64  // since when the first timer waits, as classes count; 0 if it was not offered yet
	at      int     // the index in it
}

// Job is a timer that is due.
type Job struct {
	Sender uint64 // the hash
	// Due is the deadline as it was when the timer became due: the order must not change under the heap.
	Due time.Duration
	// Attempt makes the attempt in its turn, and reports whether it failed and is to be made again.
	Attempt func(*Turn) (failed bool)
}

func (q *queue) due() time.Duration { return q.waiting[0].Due }

// add puts a timer in, behind those with the same deadline, and returns its index.
func (q *queue) add(j Job) int {
	at, _ := slices.BinarySearchFunc(q.waiting, j.Due, func(j Job, due time.Duration) int {
		return cmp.Or(cmp.Compare(j.Due, due), -1)
	})
	q.waiting = slices.Insert(q.waiting, at, j)
	return at
}

// take takes the first timer out.
func (q *queue) take() Job {
	j := q.waiting[0]
	q.ticket = 0
	if q.waiting = q.waiting[1:]; len(q.waiting) == 0 {
		q.waiting = nil
	}
	return j
}

// Turn is the turn of a timer in its room's lane. Whoever closes an event otherwise has none, and waits for nobody. Its worker owns it,
// but for what Lanes.mu guards.
type Turn struct {
	lanes  *Lanes
	room   *lane
	job    Job
	before <-chan struct{} // closed when the turn before is over
	done   chan struct{}   // closed when this one is, and all before it
	early  bool            // it began before that

	// Guarded by Lanes.mu.
	released bool        // the room's next timer may have its turn
	since    time.Time   // when it became the room's oldest turn
	patience *time.Timer // calls overrun
}

// ErrTurnBefore: the room's event before took too long, so that this one was given to nobody.
var ErrTurnBefore = errors.New("waiting for the room's event before")

// Follow is called when the turn's event is built, and waits until the turn before is over. Then the turn of the room's next timer can
// begin, if it may be early for both the lane and the caller, and else when this one's is over. isUpon reports whether the event was built
// directly upon another one. The error is ErrTurnBefore if ctx ends before.
func (w *Turn) Follow(ctx context.Context, eventID string, isUpon func(eventID string) bool, early bool) error {
	if w == nil {
		return nil
	}
	select {
	case <-w.before:
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrTurnBefore, ctx.Err())
	}
	w.lanes.mu.Lock()
	defer w.lanes.mu.Unlock()
	if w.room.alone++; w.early && !isUpon(w.room.eventID) {
		w.room.alone = 0
	}
	w.room.eventID = eventID
	if early && w.room.alone+1 >= w.lanes.spacing(len(w.room.first.waiting)) {
		w.release()
		w.lanes.arrange(w.room)
	}
	return nil
}

// release lets the room's next timer have its turn, once. Lanes.mu is held.
func (w *Turn) release() {
	if !w.released {
		w.released = true
		w.room.busy = false
	}
}

// over is a turn that is over.
var over = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// New returns lanes without jobs. One turn in earlyEvery may be early at the most, which is EarlyEvery but in tests.
func New(earlyEvery int) *Lanes {
	l := &Lanes{
		rooms: map[uint64]*lane{}, hung: map[uint64]time.Time{}, earlyEvery: earlyEvery,
		first:   newClass(Places, senderShare, maxLoans),
		retries: newClass(RetryPlaces, retryShare, maxRetryLoans),
	}
	// By deadlines, a sender with many timers that always fail would be first for ever.
	l.retries.byTicket = true
	return l
}

// Add puts a timer into its room's lane. It is a retry if its last attempt was not answered.
func (l *Lanes) Add(j Job, inRoom uint64, retry bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	room := l.rooms[inRoom]
	if room == nil {
		room = &lane{room: inRoom, last: over, alone: l.earlyEvery}
		room.first.lane, room.retries.lane = room, room
		l.rooms[inRoom] = room
	}
	q := &room.first
	if retry || l.isHung(j.Sender) {
		q = &room.retries
	}
	if q.add(j) == 0 { // else nothing changes for the room
		l.arrange(room)
		l.serve()
	}
}

// arrange sees to it that a room waits for what it may have, after any change, or begins an early turn, which needs no place, or that
// the room is forgotten. Lanes.mu is held.
func (l *Lanes) arrange(room *lane) {
	l.withdraw(room)
	for len(room.first.waiting) > 0 && l.isHung(room.first.waiting[0].Sender) {
		room.retries.add(room.first.take())
	}
	first, retry := len(room.first.waiting) > 0, len(room.retries.waiting) > 0
	switch {
	case l.stopped:
	case len(room.turns) > 0:
		// Not in a room that has overrun: it would never give back what it has no place for.
		if first && !room.busy && len(room.turns) < turnsPerRoom && room.placed && room.class == &l.first {
			l.begin(&room.first)
		}
	case first || retry:
		if first {
			l.first.offer(&room.first)
		}
		if retry && (!first || room.passed >= retryEvery) {
			l.retries.offer(&room.retries)
		}
	default:
		delete(l.rooms, room.room)
	}
}

// withdraw ends the waiting of a room's queues for places. Lanes.mu is held.
func (l *Lanes) withdraw(room *lane) {
	l.first.withdraw(&room.first)
	l.retries.withdraw(&room.retries)
}

// serve begins as many turns as there are places for. Lanes.mu is held.
func (l *Lanes) serve() {
	for !l.stopped {
		q := l.retries.next()
		if q == nil {
			q = l.first.next()
		}
		if q == nil {
			return
		}
		l.begin(q)
	}
}

// begin begins the turn of a queue's first timer. Lanes.mu is held.
func (l *Lanes) begin(q *queue) {
	room := q.lane
	l.withdraw(room)
	w := &Turn{lanes: l, room: room, job: q.take(), before: room.last, done: make(chan struct{}), early: len(room.turns) > 0}
	room.busy, room.last = true, w.done
	room.turns = append(room.turns, w)
	if q == &room.retries {
		room.passed = 0
	} else if len(room.retries.waiting) > 0 {
		room.passed++
	}
	if !w.early {
		room.class, room.placed = &l.first, true
		if q == &room.retries {
			room.class = &l.retries
		}
		room.class.free--
		l.lead(room)
	}
	l.working.Go(func() { l.work(w) })
}

// lead makes the oldest turn of a room the one whose sender the place is counted for, and whose time it is counted by. An early
// turn's time begins here: before, it waited for another. If its room has overrun, it gets a place again if there is one. Lanes.mu is
// held.
func (l *Lanes) lead(room *lane) {
	w := room.turns[0]
	room.holder = room.class.hold(w.job.Sender)
	if !room.placed && room.class.free > 0 {
		room.placed = true
		room.class.free--
		l.overtime--
	}
	w.since = time.Now()
	w.patience = time.AfterFunc(PlacePatience, func() { l.overrun(w) })
}

// work makes an attempt. Whatever a panic, or runtime.Goexit, has left undone, the turn is over then.
func (l *Lanes) work(w *Turn) {
	failed := true
	defer func() {
		<-w.before
		l.finish(w, failed)
	}()
	guard.Run("closing an event", func() { failed = w.job.Attempt(w) })
}

// finish ends a turn, which is the room's oldest. If the room has no other, another room can have its place.
func (l *Lanes) finish(w *Turn, failed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	room := w.room
	close(w.done)
	w.patience.Stop()
	w.release()
	room.turns = slices.Delete(room.turns, 0, 1)
	room.class.drop(room.holder)
	switch {
	case len(room.turns) > 0:
		l.lead(room)
	case room.placed:
		room.class.free++
	default:
		l.overtime--
	}
	if failed && time.Since(w.since) >= PlacePatience {
		l.hang(w.job.Sender)
	}
	l.arrange(room)
	l.serve()
}

// overrun is called when a turn has been its room's oldest for PlacePatience. The room goes on without its place, or, while too many
// do so already, keeps it for as long again. Retries keep theirs: they have few, and nobody else waits for them.
func (l *Lanes) overrun(w *Turn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	room := w.room
	switch {
	case len(room.turns) == 0 || room.turns[0] != w || !room.placed || room.class != &l.first:
	case l.overtime >= maxOvertime:
		w.patience.Reset(PlacePatience)
	default:
		room.placed = false
		l.overtime++
		l.first.free++
		l.serve()
	}
}

// hang makes all timers of a sender count as retries for hungFor. Those that wait behind another's do so when they are next.
// Lanes.mu is held.
func (l *Lanes) hang(sender uint64) {
	now := time.Now()
	maps.DeleteFunc(l.hung, func(_ uint64, until time.Time) bool { return !until.After(now) })
	l.hung[sender] = now.Add(hungFor)
	if s := l.first.senders[sender]; s != nil {
		for _, q := range slices.Clone(s.queues) {
			l.arrange(q.lane)
		}
	}
}

// isHung reports whether the timers of a sender count as retries. Lanes.mu is held.
func (l *Lanes) isHung(sender uint64) bool {
	until, ok := l.hung[sender]
	return ok && time.Now().Before(until)
}

// spacing returns how many turns come to one whose event is built beside another, in a room where so many wait: what waits is what is known
// of how much state the room has, and as many as EarlyEvery times EarlyEvery are much.
func (l *Lanes) spacing(waiting int) int {
	return min(max(waiting/EarlyEvery, earlyLeast), l.earlyEvery)
}

// Stop lets no more turns begin, and Wait waits for those that have begun. What waits is left waiting.
func (l *Lanes) Stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
}

func (l *Lanes) Wait() { l.working.Wait() }
