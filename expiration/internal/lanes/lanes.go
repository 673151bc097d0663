// Package lanes decides in which order overdue timers are attempted, and how many at a time.
//
// It guarantees:
//
//   - Order. The first attempts of one room run in the order of their deadlines. At most two of them overlap, see [Turn.Follow], and a
//     sequential one overlaps none.
//   - Isolation. An attempt that hangs takes little from others: there are bounds on what each class of attempts, each sender and each room
//     has in progress at the same time. The bounds are constants in places.go.
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

// An early turn begins before the previous turn of its room is over. Its event then has the same prev events as the previous one, which
// forks the event graph, and the next event merges the fork.
//
// A merge makes Dendrite resolve the room's whole state, which is slow in a room with much state, but stores the state as one block.
// Without merges, Dendrite reads up to 64 blocks each time it looks at the state. So some turns are early, but not all:
//
//   - The second turn of a burst is early.
//   - After that, turns may be early until an event was built beside the previous one, and then again after a number of events. This number
//     is earlyLeast, or up to EarlyEvery in rooms where so many timers wait that there must be much state.
//
// One in two would make every event a merge, because an event that is built beside a merge merges the same fork. See docs/performance.md,
// "Mass expiry".
const (
	earlyLeast = 4
	EarlyEvery = 8
)

// turnsPerRoom is how many turns of a room may be in progress at the same time.
const turnsPerRoom = 2

// Lanes decides when each due timer is attempted, and runs the attempts. Attempts that hang take little from others:
//
//   - The first attempts of a room run in the order of their deadlines, and one at a time, except for early turns (see EarlyEvery). Among
//     the waiting rooms, the one with the earliest deadline is next.
//   - A first attempt that takes longer than PlacePatience gives its place to another room. Its own room still waits for it.
//   - One sender gets few places while others need them.
//   - Retries have a few places of their own, which senders get in turns. Within a room they come after the first attempts. If an attempt
//     hung, all timers of its sender count as retries for a while, in every room, because their attempts may hang too.
//
// The methods of lane, queue, class and sender, and most methods of Lanes, expect their caller to hold Lanes.mu; their comments say so.
type Lanes struct {
	working sync.WaitGroup // the turns in progress; Stop prevents new ones

	mu       sync.Mutex       // guards everything below; a leaf in the lock order of expiration/doc.go
	rooms    map[uint64]*lane // the rooms with timers that wait or are attempted
	first    class
	retries  class
	overtime int                  // how many rooms are in progress without a place
	hung     map[uint64]time.Time // until when the timers of a sender count as retries
	stopped  bool

	earlyEvery int
}

// lane is one room's due timers.
type lane struct {
	room    uint64 // the hash of the room ID
	first   queue  // first attempts
	retries queue
	turns   []*Turn       // in progress, the oldest first; at most turnsPerRoom
	class   *class        // the class whose place the room has, or had until it overran
	placed  bool          // the room has a place
	holder  *sender       // the sender for whom the place counts: that of the oldest turn
	busy    bool          // the next turn may not begin yet
	passed  int           // how many first attempts began while a retry waited
	last    chan struct{} // closed when the latest turn and all before it are over
	eventID string        // of the latest event that was built
	alone   int           // how many events were built since the last fork
}

// queue holds those timers of a room that wait in one class, in the order of their deadlines.
type queue struct {
	lane    *lane
	waiting []Job
	offered *sender // the sender in whose heap the queue is, or nil
	ticket  uint64  // the ticket of the first timer; 0 if it was not offered yet
	at      int     // the index in that heap
}

// Job is a timer that is due.
type Job struct {
	Sender uint64 // the hash of the user ID
	// Due is the deadline at the time when the timer became due. It does not change, because heaps are ordered by it.
	Due time.Duration
	// Sequential: the turn is not early, and neither is the next one. So the job's event is built upon all events before it, and all events
	// after it are built upon it.
	Sequential bool
	// Attempt makes the attempt, and reports whether it failed and is to be repeated.
	Attempt func(*Turn) (failed bool)
}

func (q *queue) due() time.Duration { return q.waiting[0].Due }

// add inserts a timer behind those with the same deadline, and returns its index.
func (q *queue) add(j Job) int {
	at, _ := slices.BinarySearchFunc(q.waiting, j.Due, func(j Job, due time.Duration) int {
		return cmp.Or(cmp.Compare(j.Due, due), -1)
	})
	q.waiting = slices.Insert(q.waiting, at, j)
	return at
}

// take removes the first timer and returns it.
func (q *queue) take() Job {
	j := q.waiting[0]
	q.ticket = 0
	if q.waiting = q.waiting[1:]; len(q.waiting) == 0 {
		q.waiting = nil
	}
	return j
}

// Turn is the turn of a timer in its room's lane. It belongs to its worker, except for the fields that Lanes.mu guards. An attempt outside
// of the lanes has a nil Turn, and waits for no other.
type Turn struct {
	lanes  *Lanes
	room   *lane
	job    Job
	before <-chan struct{} // closed when the previous turn is over
	done   chan struct{}   // closed when this turn and all before it are over
	early  bool            // it began before the previous turn was over

	// Guarded by Lanes.mu.
	released bool        // the room's next turn may begin
	since    time.Time   // when it became the room's oldest turn
	patience *time.Timer // calls overrun
}

// ErrTurnBefore: the previous turn of the room took too long, so this turn's event was given to nobody.
var ErrTurnBefore = errors.New("waiting for the previous event in the room")

// Follow is called when the turn's event is built, and waits until the previous turn is over. If early is set and the lane allows it, the
// room's next turn begins then, unless one of the two is sequential; otherwise it begins when this turn is over. isUpon reports whether another event is among this event's prev
// events. The error is ErrTurnBefore if ctx ends first.
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
	if early && !w.job.Sequential && w.room.alone+1 >= w.lanes.spacing(len(w.room.first.waiting)) {
		w.release()
		w.lanes.arrange(w.room)
	}
	return nil
}

// release lets the room's next turn begin, once. The caller holds Lanes.mu.
func (w *Turn) release() {
	if !w.released {
		w.released = true
		w.room.busy = false
	}
}

// over is the channel of a turn that is over.
var over = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// New returns lanes without jobs. At most one turn in earlyEvery is early. Outside of tests it is EarlyEvery.
func New(earlyEvery int) *Lanes {
	l := &Lanes{
		rooms: map[uint64]*lane{}, hung: map[uint64]time.Time{}, earlyEvery: earlyEvery,
		first:   newClass(Places, senderShare, maxLoans),
		retries: newClass(RetryPlaces, retryShare, maxRetryLoans),
	}
	// If the earliest deadline were next, a sender with many failing timers would always be first.
	l.retries.byTicket = true
	return l
}

// Add puts a timer into its room's lane. retry says that its last attempt was not answered.
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
	if q.add(j) == 0 { // otherwise nothing changes for the room
		l.arrange(room)
		l.serve()
	}
}

// arrange updates a room after any change: it offers the room's queues for places, begins an early turn, which needs no place, or forgets
// the room. The caller holds Lanes.mu.
func (l *Lanes) arrange(room *lane) {
	l.withdraw(room)
	for len(room.first.waiting) > 0 && l.isHung(room.first.waiting[0].Sender) {
		room.retries.add(room.first.take())
	}
	first, retry := len(room.first.waiting) > 0, len(room.retries.waiting) > 0
	switch {
	case l.stopped:
	case len(room.turns) > 0:
		// A room that has overrun gets no early turn, because it has no place to give back.
		if first && !room.first.waiting[0].Sequential && !room.busy && len(room.turns) < turnsPerRoom && room.placed && room.class == &l.first {
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

// withdraw withdraws both queues of a room. The caller holds Lanes.mu.
func (l *Lanes) withdraw(room *lane) {
	l.first.withdraw(&room.first)
	l.retries.withdraw(&room.retries)
}

// serve begins as many turns as there are free places. The caller holds Lanes.mu.
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

// begin begins the turn of a queue's first timer. The caller holds Lanes.mu.
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

// lead makes the room's oldest turn the one whose sender and whose time count for the place. The time of an early turn begins here, because
// it waited for another turn before. A room that has overrun gets a place again if one is free. The caller holds Lanes.mu.
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

// work runs an attempt and ends its turn, also after a panic or runtime.Goexit.
func (l *Lanes) work(w *Turn) {
	failed := true
	defer func() {
		<-w.before
		l.finish(w, failed)
	}()
	guard.Run("closing an event", func() { failed = w.job.Attempt(w) })
}

// finish ends a turn, which is its room's oldest. If the room has no other turn, its place is free for another room.
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

// overrun is called when a turn has been its room's oldest for PlacePatience. The room then continues without its place. If maxOvertime
// rooms do so already, it keeps the place for another PlacePatience. Retries always keep theirs: they have few, and only retries wait for
// them.
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

// hang makes all timers of a sender count as retries for hungFor. A timer that waits behind another sender's moves when it becomes the
// first of its queue. The caller holds Lanes.mu.
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

// isHung reports whether the timers of a sender count as retries. The caller holds Lanes.mu.
func (l *Lanes) isHung(sender uint64) bool {
	until, ok := l.hung[sender]
	return ok && time.Now().Before(until)
}

// spacing returns how many events come between two forks in a room where so many timers wait. The number of waiting timers is the only hint
// of how much state the room has; EarlyEvery times EarlyEvery of them count as much.
func (l *Lanes) spacing(waiting int) int {
	return min(max(waiting/EarlyEvery, earlyLeast), l.earlyEvery)
}

// Stop prevents new turns. Timers that wait are left waiting.
func (l *Lanes) Stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
}

// Wait waits for the turns that have begun.
func (l *Lanes) Wait() { l.working.Wait() }
