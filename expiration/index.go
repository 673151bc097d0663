package expiration

import (
	"cmp"
	"container/heap"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
)

// timer is a timer in memory: what is needed while it runs. The event stands in its row, which is read when the timer ends.
// There can be a million of them, so it has no pointers: they would cost memory, and the garbage collector time.
//
// All of it is guarded by Timers.mu; claimed, deadline and duration change only while the row's lock is held as well.
type timer struct {
	nid int64 // of the row; 0 if the place is free

	token [tokenPrefix]byte
	// The numbers of the event's ID, its room and sender, the piece of state, or 0 if it is none, and the request that sent the
	// event, or 0 if it cannot be repeated.
	event, room, sender, state, request uint64

	received int64 // as the row has it, in milliseconds
	duration time.Duration
	deadline int64         // as the row has it: the wall clock, in milliseconds
	due      time.Duration // the same moment by the monotonic clock, see clock
	// wake is when the scheduler looks at the timer. A refresh moves only due: the scheduler finds out when it looks.
	wake time.Duration
	// asked counts the requests with the token, and does not outlive the process.
	asked Bucket
	// place is the timer's index in the heap, or -1.
	place int32
	// The neighbours in the lists of timers with the same state, and of the same sender.
	nextOfState, nextOfSender, previousOfSender slot

	// failures counts the attempts that failed since the last one that did not; it makes the pauses grow.
	failures uint8
	// awaited counts how many times in a row the roomserver has not got as far as it was before a crash, see Timers.await.
	awaited uint8
	// unsendable and unanswered count the attempts that failed in these ways, see Timers.settle.
	unsendable, unanswered uint8
	// delayed is set for the timer of a delayed event.
	delayed bool
	// claimed is set when the row is.
	claimed bool
	// unsure is set when a claim failed so that it may have been written all the same.
	unsure bool
	// confirmed is set when the roomserver has said that the event is in its room, since the process started.
	confirmed bool
	// unsent is set when the roomserver has failed to take the event, or does not know it, until it turns out that it has it.
	unsent bool
	// doubtful is set while somebody must look again whether the event was replaced.
	doubtful bool
	// superseded is set when newer state was sent here, until it is found out whether it replaced the event.
	superseded bool
	// pending is set until the roomserver has answered: the event may not be in its room yet.
	pending bool
	// gone is set when nobody finds the timer any more, but for what follows.
	gone bool
	// left is set when the timer is gone and its row is not yet deleted.
	left bool
	// refused is set while the token of a timer that is gone is still answered otherwise than an unknown one.
	refused bool
}

// tokenPrefix is how many bytes of a token's hash are kept in memory: 128 bits are not found by guessing.
const tokenPrefix = 16

// running reports whether there is such a timer and its token is valid.
func (tm *timer) running() bool { return tm != nil && !tm.gone && !tm.claimed }

// slot is a timer's place in memory, which another timer has later. 0 is none.
type slot uint32

// ref names a timer for as long as it is in memory, and nothing after that.
type ref struct {
	slot slot
	nid  int64
}

// index finds timers by all that they are asked for by: the numbers that a Digest has. It has no lock of its own: Timers.mu
// guards it.
type index struct {
	timers   arena[timer]
	lastNID  int64
	count    int // of those that are not gone
	delayed  int // of them, those of delayed events
	byToken  table
	byState  table // the first of each list
	bySender table // likewise
	wakes    wakeHeap
	// left has the timers that are gone and whose rows are not yet deleted.
	left map[ref]struct{}

	// byRequest has the timers of requests of which Dendrite's memory does not know what came of them: those of earlier
	// processes, and those that failed.
	byRequest table
	// answered has, by the hashes of the requests, the events of those whose timers are gone meanwhile, and answeredBefore those
	// of an earlier time.
	answered, answeredBefore map[uint64]string
}

func newIndex() *index {
	x := &index{
		left:     map[ref]struct{}{},
		answered: map[uint64]string{},
	}
	x.wakes.timers = &x.timers
	x.byToken = newTable(func(s slot) uint64 { return tokenKey(x.timers.at(s).token) })
	x.byState = newTable(func(s slot) uint64 { return x.timers.at(s).state })
	x.bySender = newTable(func(s slot) uint64 { return x.timers.at(s).sender })
	x.byRequest = newTable(func(s slot) uint64 { return x.timers.at(s).request })
	return x
}

// tokenKey is what a token is looked up by.
func tokenKey(token [tokenPrefix]byte) uint64 {
	var key uint64
	for _, b := range token[:8] {
		key = key<<8 | uint64(b)
	}
	return key
}

// at returns a timer, or nil if it is no longer in memory.
func (x *index) at(r ref) *timer {
	if r.nid == 0 {
		return nil
	}
	if tm := x.timers.at(r.slot); tm.nid == r.nid {
		return tm
	}
	return nil
}

// ref returns the name of the timer in a slot.
func (x *index) ref(s slot) ref { return ref{s, x.timers.at(s).nid} }

// token returns the timer of a token, or of a delay ID, running or not.
func (x *index) token(h TokenHash, delayed bool) ref {
	token := [tokenPrefix]byte(h[:tokenPrefix])
	s := x.byToken.get(tokenKey(token))
	if s == 0 {
		return ref{}
	}
	tm := x.timers.at(s)
	if tm.token != token || tm.delayed != delayed {
		return ref{}
	}
	return ref{s, tm.nid}
}

// ofState calls f for each timer of a piece of state.
func (x *index) ofState(state uint64, f func(ref, *timer)) {
	for s := x.byState.get(state); s != 0; {
		tm := x.timers.at(s)
		next := tm.nextOfState
		f(ref{s, tm.nid}, tm)
		s = next
	}
}

// ofSender calls f for each timer of a user.
func (x *index) ofSender(sender uint64, f func(ref, *timer)) {
	for s := x.bySender.get(sender); s != 0; {
		tm := x.timers.at(s)
		next := tm.nextOfSender
		f(ref{s, tm.nid}, tm)
		s = next
	}
}

// inRoom returns the timers in a room. It looks at every timer: whole rooms change rarely.
func (x *index) inRoom(room uint64) (refs []ref) {
	for s, tm := range x.timers.all() {
		if tm.nid != 0 && !tm.gone && tm.room == room {
			refs = append(refs, ref{s, tm.nid})
		}
	}
	return refs
}

// room returns an error if there is none for another timer.
func (x *index) room() error {
	if x.timers.last == maxTimers && len(x.timers.free) == 0 {
		return fmt.Errorf("there are %d timers, and no room for another", maxTimers)
	}
	return nil
}

// add takes a timer in. due is its deadline by the monotonic clock.
func (x *index) add(row Indexed, due time.Duration) ref {
	r := x.put(row, due)
	tm := x.at(r)
	x.byToken.set(tokenKey(tm.token), r.slot)
	x.addToState(r.slot, tm)
	x.addToSender(r.slot, tm)
	return r
}

// put is the first half of add, after which nobody finds the timer. The other half is link.
func (x *index) put(row Indexed, due time.Duration) ref {
	s := x.timers.take()
	tm := x.timers.at(s)
	*tm = timer{
		nid: row.NID, token: [tokenPrefix]byte(row.Digest[digestToken:]),
		event: row.Digest.get(digestEvent), room: row.Digest.get(digestRoom), sender: row.Digest.get(digestSender),
		state: row.Digest.get(digestState), request: row.Digest.get(digestRequest),
		received: int64(row.Digest.get(digestReceived)), duration: row.Duration, deadline: row.Deadline.UnixMilli(), due: due,
		delayed: row.Digest[digestDelayed] != 0, claimed: row.Claimed, place: -1,
	}
	x.lastNID = max(x.lastNID, row.NID)
	x.count++
	if tm.delayed {
		x.delayed++
	}
	return ref{s, row.NID}
}

// link is called once, for all that was put into an index that was empty, and schedules those that are not claimed for when they
// are due. Their requests are those of an earlier process. With a million timers that takes about half the time of adding and scheduling each: the tables need not grow, and are
// filled one beside the other. It reports false if one of them could not be filled, and the index is of no use then.
func (x *index) link() bool {
	var (
		linking sync.WaitGroup
		failed  atomic.Bool
	)
	all := func(f func(slot, *timer)) {
		linking.Go(func() {
			if !guard.Run("making the index", func() {
				for s, tm := range x.timers.all() {
					f(s, tm)
				}
			}) {
				failed.Store(true)
			}
		})
	}
	for _, t := range []*table{&x.byToken, &x.byState, &x.bySender, &x.byRequest} {
		t.reserve(x.count)
	}
	all(func(s slot, tm *timer) { x.byToken.set(tokenKey(tm.token), s) })
	all(x.addToState)
	all(x.addToSender)
	all(x.addToRequests)
	all(func(s slot, tm *timer) {
		if !tm.claimed {
			tm.wake = tm.due
			x.wakes.Push(s)
		}
	})
	linking.Wait()
	heap.Init(&x.wakes)
	return !failed.Load()
}

func (x *index) addToState(s slot, tm *timer) {
	if tm.state != 0 {
		tm.nextOfState = x.byState.get(tm.state)
		x.byState.set(tm.state, s)
	}
}

func (x *index) addToSender(s slot, tm *timer) {
	if next := x.bySender.get(tm.sender); next != 0 {
		tm.nextOfSender = next
		x.timers.at(next).previousOfSender = s
	}
	x.bySender.set(tm.sender, s)
}

// addToRequests lets a timer be found by its request.
func (x *index) addToRequests(s slot, tm *timer) {
	if tm.request != 0 {
		x.byRequest.set(tm.request, s)
	}
}

// remove takes out what add put in, and may be called again. The timer is left in memory until forgetRow is called.
func (x *index) remove(r ref) {
	tm := x.at(r)
	if tm == nil || tm.gone {
		return
	}
	tm.gone, tm.left = true, true
	x.left[r] = struct{}{}
	x.count--
	if tm.delayed {
		x.delayed--
	}
	x.unschedule(r)
	x.byToken.remove(tokenKey(tm.token), r.slot)
	if tm.state != 0 {
		x.removeFromState(r.slot, tm)
	}
	if tm.request != 0 {
		x.byRequest.remove(tm.request, r.slot)
	}
	if tm.nextOfSender != 0 {
		x.timers.at(tm.nextOfSender).previousOfSender = tm.previousOfSender
	}
	switch {
	case tm.previousOfSender != 0:
		x.timers.at(tm.previousOfSender).nextOfSender = tm.nextOfSender
	case tm.nextOfSender != 0:
		x.bySender.set(tm.sender, tm.nextOfSender)
	default:
		x.bySender.remove(tm.sender, r.slot)
	}
}

// removeFromState takes a timer out of a list that is short: what is replaced goes.
func (x *index) removeFromState(s slot, tm *timer) {
	first := x.byState.get(tm.state)
	switch {
	case first != s:
		before := x.timers.at(first)
		for before.nextOfState != s {
			before = x.timers.at(before.nextOfState)
		}
		before.nextOfState = tm.nextOfState
	case tm.nextOfState != 0:
		x.byState.set(tm.state, tm.nextOfState)
	default:
		x.byState.remove(tm.state, s)
	}
}

// forgetRow is called when the row of a timer that is gone is deleted.
func (x *index) forgetRow(r ref) {
	if tm := x.at(r); tm != nil {
		tm.left = false
		delete(x.left, r)
		x.free(r, tm)
	}
}

// refuse remembers the token of a timer that is gone, until the scheduler looks at it.
func (x *index) refuse(r ref, until time.Duration) {
	tm := x.at(r)
	tm.refused = true
	x.byToken.set(tokenKey(tm.token), r.slot)
	x.schedule(r, until)
}

// forgetToken ends what refuse began.
func (x *index) forgetToken(r ref) {
	tm := x.at(r)
	tm.refused = false
	x.byToken.remove(tokenKey(tm.token), r.slot)
	x.free(r, tm)
}

// free gives the place of a timer that is gone back if nothing needs it any more.
func (x *index) free(r ref, tm *timer) {
	if tm.left || tm.refused {
		return
	}
	x.unschedule(r)
	*tm = timer{}
	x.timers.giveBack(r.slot)
}

// ofRequest returns the timer of a request that may be repeated, or the event of one whose timer is gone.
func (x *index) ofRequest(request uint64) (r ref, eventID string) {
	if s := x.byRequest.get(request); s != 0 {
		r = x.ref(s)
	}
	return r, cmp.Or(x.answered[request], x.answeredBefore[request])
}

// answer remembers the event of a request whose timer goes, if the request may be repeated.
func (x *index) answer(r ref, eventID string) {
	if tm := x.at(r); tm != nil && tm.request != 0 && x.byRequest.get(tm.request) == r.slot {
		x.byRequest.remove(tm.request, r.slot)
		x.answered[tm.request] = eventID
	}
}

// forgetRequests forgets the requests whose timers were gone already when it was called last.
func (x *index) forgetRequests() { x.answered, x.answeredBefore = map[uint64]string{}, x.answered }

// schedule makes the scheduler look at the timer at wake.
func (x *index) schedule(r ref, wake time.Duration) {
	tm := x.at(r)
	tm.wake = wake
	if tm.place < 0 {
		heap.Push(&x.wakes, r.slot)
	} else {
		heap.Fix(&x.wakes, int(tm.place))
	}
}

func (x *index) unschedule(r ref) {
	if tm := x.at(r); tm.place >= 0 {
		heap.Remove(&x.wakes, int(tm.place))
	}
}

// wakeHeap has the timer that is looked at next in front.
type wakeHeap struct {
	timers *arena[timer]
	slots  []slot
}

func (h *wakeHeap) at(i int) *timer    { return h.timers.at(h.slots[i]) }
func (h *wakeHeap) Len() int           { return len(h.slots) }
func (h *wakeHeap) Less(i, j int) bool { return h.at(i).wake < h.at(j).wake }
func (h *wakeHeap) Swap(i, j int) {
	h.slots[i], h.slots[j] = h.slots[j], h.slots[i]
	h.at(i).place, h.at(j).place = int32(i), int32(j)
}

func (h *wakeHeap) Push(x any) {
	s := x.(slot)
	h.timers.at(s).place = int32(len(h.slots))
	h.slots = append(h.slots, s)
}

func (h *wakeHeap) Pop() any {
	last := len(h.slots) - 1
	s := h.slots[last]
	h.slots = h.slots[:last]
	h.timers.at(s).place = -1
	return s
}
