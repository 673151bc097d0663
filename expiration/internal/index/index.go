// Package index keeps the timers in memory: the phase of each timer, and the maps by which it is found.
//
// # Phases
//
//	phase     found by           row                  scheduler
//	Pending   token, state, …    being written        does not look
//	Running   token, state, …    not claimed          looks when the timer is due
//	Claimed   token, state, …    claimed              looks again after a failed attempt
//	Stopped   nothing            not claimed, exists  looks again if the row could not be deleted
//	Finished  nothing            claimed, exists      looks again if the row could not be deleted
//	Gone      nothing            deleted              does not look
//
//	from                       to        by
//	(new)                      Pending   Add
//	(new)                      Running   Load, of a row that is not claimed
//	(new)                      Claimed   Load, of a row that is claimed
//	Pending                    Running   Activate
//	Pending, Running           Claimed   Claim
//	Pending, Running           Stopped   Stop
//	Claimed                    Running   Unclaim
//	Claimed                    Finished  Stop
//	Stopped, Finished          Gone      Forget
//
// Every other transition is refused: the method reports false and changes nothing. The token of a timer that has ended can stay in the
// index for a while, see [Index.Refuse].
//
// # Bounds
//
// A running timer takes less than 500 bytes. The index consists of plain maps and has no lock: its owner guards it.
package index

import (
	"cmp"
	"container/heap"
	"encoding/binary"
	"iter"
	"maps"
	"time"
)

// Index finds timers by everything that they are looked up by.
type Index struct {
	lastNID  int64
	expiring int // the number of live timers of expiring events
	delayed  int // the number of live timers of delayed events

	byToken  map[uint64]*Timer // by tokenKey
	byState  lists
	bySender [kinds]lists
	wakes    wakeHeap
	left     map[*Timer]struct{}      // the timers that have ended and still have their rows
	refused  map[*Timer]time.Duration // until when the tokens of timers that have ended are answered

	// byRequest contains the timers of requests whose result Dendrite does not remember: requests to an earlier process, and requests that
	// failed.
	byRequest map[uint64]*Timer
	// loaded contains the timers that Link makes findable, and chunk the memory for the next ones.
	loaded []*Timer
	chunk  []Timer

	// ended contains the events of requests whose timers have ended, and endedBefore those of the previous period, see ForgetRequests.
	ended, endedBefore map[uint64]string
}

// New returns an index without timers.
func New() *Index {
	return &Index{
		byToken:  map[uint64]*Timer{},
		byState:  newLists(func(tm *Timer) *links { return &tm.ofState }),
		bySender: [kinds]lists{Expiring: newLists(ofSender), Delayed: newCountedLists(ofSender), ServiceDelayed: newCountedLists(ofSender)},
		left:     map[*Timer]struct{}{},
		refused:  map[*Timer]time.Duration{},

		byRequest: map[uint64]*Timer{},
		ended:     map[uint64]string{},
	}
}

// Len returns the numbers of live timers.
func (x *Index) Len() (expiring, delayed int) { return x.expiring, x.delayed }

// NextNID returns a number that no row has.
func (x *Index) NextNID() int64 { return x.lastNID + 1 }

// ByToken returns the timer of a token or a delay ID, or nil.
func (x *Index) ByToken(token [TokenSize]byte, delayed bool) *Timer {
	if tm := x.byToken[tokenKey(token)]; tm != nil && tm.token == token && tm.Delayed() == delayed {
		return tm
	}
	return nil
}

// tokenKey is the half of a token that the map has. A token is an HMAC under a secret key: two with the same half do not occur.
func tokenKey(token [TokenSize]byte) uint64 { return binary.BigEndian.Uint64(token[:]) }

// OfState calls f for each live timer of a piece of state. f may stop that timer.
func (x *Index) OfState(state uint64, f func(*Timer)) { x.byState.each(state, f) }

// OfSender calls f for each live timer of one kind of a user. f may stop that timer.
func (x *Index) OfSender(sender uint64, kind Kind, f func(*Timer)) { x.bySender[kind].each(sender, f) }

// DelayedOf calls f for each live timer of a delayed event of a user. f may stop that timer.
func (x *Index) DelayedOf(sender uint64, f func(*Timer)) {
	x.OfSender(sender, Delayed, f)
	x.OfSender(sender, ServiceDelayed, f)
}

// Count returns the number of live timers of delayed events of one kind of a user.
func (x *Index) Count(sender uint64, kind Kind) int { return x.bySender[kind].count[sender] }

// Live calls f for each live timer. f may stop that timer.
func (x *Index) Live(f func(*Timer)) {
	for _, bySender := range x.bySender {
		for sender := range bySender.first {
			bySender.each(sender, f)
		}
	}
}

// InRoom returns the live timers in a room. It looks at every timer, which is acceptable because it is rarely called.
func (x *Index) InRoom(room uint64) (timers []*Timer) {
	x.Live(func(tm *Timer) {
		if tm.room == room {
			timers = append(timers, tm)
		}
	})
	return timers
}

// Left returns the timers that have ended and still have their rows.
func (x *Index) Left() iter.Seq[*Timer] { return maps.Keys(x.left) }

// Add adds a new timer, which is Pending. due is its deadline by the monotonic clock.
func (x *Index) Add(row Row, due time.Duration) *Timer {
	tm := &Timer{}
	x.add(tm, row, due)
	x.addToken(tm)
	x.addToState(tm)
	x.addToSender(tm)
	return tm
}

func (x *Index) add(tm *Timer, row Row, due time.Duration) {
	tm.init(row, due)
	x.lastNID = max(x.lastNID, row.NID)
	x.count(tm, 1)
}

func (x *Index) addToken(tm *Timer) { x.byToken[tokenKey(tm.token)] = tm }

func (x *Index) addToState(tm *Timer) {
	if tm.state != 0 {
		x.byState.add(tm.state, tm)
	}
}

func (x *Index) addToSender(tm *Timer) { x.bySender[tm.kind].add(tm.sender, tm) }

// Activate makes a pending timer Running, and schedules it for wake.
func (x *Index) Activate(tm *Timer, wake time.Duration) bool {
	if tm.Phase() != Pending {
		return false
	}
	tm.phase = Running
	x.Schedule(tm, wake)
	return true
}

// Claim notes that the row says how the timer ends.
func (x *Index) Claim(tm *Timer) bool {
	if !tm.Running() {
		return false
	}
	tm.phase = Claimed
	return true
}

// Unclaim notes that the row is not claimed, although memory says so. That happens if the room had the event already, so that the claim was
// only noted in memory, and finalising the timer failed.
func (x *Index) Unclaim(tm *Timer) bool {
	if tm.Phase() != Claimed {
		return false
	}
	tm.phase = Running
	return true
}

// Stop ends a timer, which is no longer found after that. It stays in memory until Forget is called.
func (x *Index) Stop(tm *Timer) bool {
	switch tm.Phase() {
	case Pending, Running:
		tm.phase = Stopped
	case Claimed:
		tm.phase = Finished
	default:
		return false
	}
	x.left[tm] = struct{}{}
	x.count(tm, -1)
	x.unschedule(tm)
	x.forgetToken(tm)
	if tm.state != 0 {
		x.byState.remove(tm.state, tm)
	}
	x.bySender[tm.kind].remove(tm.sender, tm)
	if x.byRequest[tm.request] == tm {
		delete(x.byRequest, tm.request)
	}
	return true
}

// Forget notes that the row of an ended timer is deleted.
func (x *Index) Forget(tm *Timer) bool {
	if !tm.IsLeft() {
		return false
	}
	tm.phase = Gone
	delete(x.left, tm)
	x.release(tm)
	if until, refused := x.Refused(tm); refused {
		x.Schedule(tm, until)
	}
	return true
}

// Refused reports whether the token of an ended timer is answered with a refusal, and until when. See Refuse.
func (x *Index) Refused(tm *Timer) (until time.Duration, refused bool) {
	until, refused = x.refused[tm]
	return until, refused
}

// Refuse keeps the token of an ended timer in the index until ForgetToken is called, and schedules the timer for then.
func (x *Index) Refuse(tm *Timer, until time.Duration) bool {
	if tm.Live() || tm.Phase() == Gone {
		return false
	}
	x.refused[tm] = until
	x.byToken[tokenKey(tm.token)] = tm
	x.Schedule(tm, until)
	return true
}

// ForgetToken undoes Refuse.
func (x *Index) ForgetToken(tm *Timer) bool {
	if _, refused := x.Refused(tm); !refused {
		return false
	}
	delete(x.refused, tm)
	x.forgetToken(tm)
	x.release(tm)
	return true
}

// forgetToken removes a token, unless another timer has it by now.
func (x *Index) forgetToken(tm *Timer) {
	if x.byToken[tokenKey(tm.token)] == tm {
		delete(x.byToken, tokenKey(tm.token))
	}
}

// release removes a timer that is no longer needed.
func (x *Index) release(tm *Timer) {
	if _, refused := x.Refused(tm); tm.phase == Gone && !refused {
		x.unschedule(tm)
	}
}

func (x *Index) count(tm *Timer, n int) {
	if tm.Delayed() {
		x.delayed += n
	} else {
		x.expiring += n
	}
}

// Repeatable makes a live timer findable by its request.
func (x *Index) Repeatable(tm *Timer) {
	if tm.Live() && tm.request != 0 {
		x.byRequest[tm.request] = tm
	}
}

// OfRequest returns the live timer of a request, or the event of a request whose timer has ended.
func (x *Index) OfRequest(request uint64) (tm *Timer, eventID string) {
	return x.byRequest[request], cmp.Or(x.ended[request], x.endedBefore[request])
}

// RememberRequest keeps the event of a request whose timer ends, if the timer is findable by its request.
func (x *Index) RememberRequest(tm *Timer, eventID string) {
	if tm != nil && tm.request != 0 && x.byRequest[tm.request] == tm {
		delete(x.byRequest, tm.request)
		x.ended[tm.request] = eventID
	}
}

// ForgetRequests forgets the requests that were remembered before its previous call.
func (x *Index) ForgetRequests() { x.ended, x.endedBefore = map[uint64]string{}, x.ended }

// First returns the timer that the scheduler must look at next, or nil.
func (x *Index) First() *Timer {
	if len(x.wakes) == 0 {
		return nil
	}
	return x.wakes[0]
}

// Schedule makes the scheduler look at a timer at wake. A Pending timer is refused, because Activate schedules it.
func (x *Index) Schedule(tm *Timer, wake time.Duration) bool {
	if _, refused := x.Refused(tm); tm.Phase() == Pending || tm.Phase() == Gone && !refused {
		return false
	}
	tm.wake = wake
	if tm.place < 0 {
		heap.Push(&x.wakes, tm)
	} else {
		heap.Fix(&x.wakes, int(tm.place))
	}
	return true
}

// HandOver moves a timer from the scheduler to an attempt, see Attempt.
func (x *Index) HandOver(tm *Timer) {
	x.unschedule(tm)
	x.Attempt(tm)
}

// Attempt notes that an attempt begins, and Returned that it is over. Before Returned, the timer must be scheduled again or have ended.
func (x *Index) Attempt(tm *Timer) { tm.attempts++ }

func (x *Index) Returned(tm *Timer) { tm.attempts-- }

// Empty reports whether the index contains nothing, not even timers that have ended.
func (x *Index) Empty() bool {
	return x.expiring+x.delayed+len(x.byToken)+len(x.wakes)+len(x.left)+len(x.refused)+len(x.byRequest) == 0
}

func (x *Index) unschedule(tm *Timer) {
	if tm.place >= 0 {
		heap.Remove(&x.wakes, int(tm.place))
	}
}

// wakeHeap has the timer with the earliest wake in front.
type wakeHeap []*Timer

func (h wakeHeap) Len() int { return len(h) }

func (h wakeHeap) Less(i, j int) bool {
	if h[i].wake != h[j].wake {
		return h[i].wake < h[j].wake
	}
	return h[i].Deadline < h[j].Deadline // after a restart with a grace period, many are due at the same moment
}

func (h wakeHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].place, h[j].place = int32(i), int32(j)
}

func (h *wakeHeap) Push(x any) {
	tm := x.(*Timer)
	tm.place = int32(len(*h))
	*h = append(*h, tm)
}

func (h *wakeHeap) Pop() any {
	last := len(*h) - 1
	tm := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	tm.place = -1
	return tm
}
