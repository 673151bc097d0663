package lanes

import (
	"container/heap"
	"time"
)

// The bounds on what is in progress at the same time. A place is the right of one room to have timers attempted. Together, places and
// overtime allow 84 rooms, which is less than the 90 connections to PostgreSQL of Dendrite's sample configuration, see Places.
const (
	// Places is the number of rooms in which timers are closed at the same time, not counting retries and attempts that overrun. Attempts
	// mostly wait for the roomserver or for a commit, so more of them make larger group commits. Dendrite's sample configuration has 90
	// connections to PostgreSQL, and an event sometimes needs two of them. With as many rooms as connections, all could wait for their
	// second one.
	Places = 64
	// RetryPlaces is the number of places for retries. They are separate from Places, so neither class waits for the other. Eight rooms at
	// a time are nearly as fast as all of them (docs/performance.md).
	RetryPlaces = 8
	// PlacePatience is how long a first attempt holds its place. A roomserver that works answers within a second, so a timer that waits for
	// the place is closed within about two more.
	PlacePatience = 2 * time.Second
	// maxOvertime is how many rooms may continue without a place. It is small, because a slow database makes all attempts overrun, and each
	// of them then holds a connection. When it is reached, attempts keep their places until they end.
	maxOvertime = 12
	// senderShare is how many places one sender's first attempts may always hold. maxLoans is how many more are lent to senders with due
	// timers in more rooms, to all of them together. So one user's mass expiry gets ten places, and ten users whose attempts all hang get
	// 28 of 64. More places would gain little, see RetryPlaces, and would take processor time from other users' events.
	senderShare = 2
	maxLoans    = 8
	// retryShare and maxRetryLoans are the same for retries: one sender holds at most five of the eight places.
	retryShare    = 1
	maxRetryLoans = 4
	// retryEvery is the number of first attempts in a room after which a retry may come before the next one. Otherwise it could wait
	// forever.
	retryEvery = 8
	// hungFor is how long a sender's timers are treated as retries after one of its attempts overran its place and failed. It is long
	// enough for ten such senders to have one attempt each with RetryPlaces, so that none of them stops counting too soon.
	hungFor = 2 * time.Minute
)

// class is a set of places, with the rooms that wait for one. A sender is either within its share, or over it and then needs a loan. The
// next room is the first of two heaps, so finding it takes no search. Lanes.mu guards it.
type class struct {
	free         int                // places that no room holds
	share        int                // how many rooms of one sender may be in progress without a loan
	loans        int                // the limit of loans
	lent         int                // the loans at present
	byTicket     bool               // the sender that waits longest is next, not the one with the earliest deadline
	lastTicket   uint64             // the last ticket that was given out
	senders      map[uint64]*sender // the senders with rooms that wait or are in progress, by hash
	within, over senderHeap         // the senders with rooms that wait
}

// sender is what a class knows of a user. Its rooms are those whose next timer, or whose timer in progress, belongs to the user.
type sender struct {
	class  *class
	hash   uint64
	queues queueHeap   // the queues that wait for a place
	holds  int         // how many of its rooms are in progress, overtime included
	ticket uint64      // a new one when the sender begins to wait, gets a place or gives it back
	heap   *senderHeap // class.within, class.over or nil
	at     int         // the index in that heap
}

func newClass(places, share, loans int) class {
	return class{free: places, share: share, loans: loans, senders: map[uint64]*sender{}}
}

// next returns the queue that gets the next place, or nil if no queue waits or no place is free.
func (c *class) next() *queue {
	if c.free == 0 {
		return nil
	}
	var s *sender
	if len(c.within) > 0 {
		s = c.within[0]
	}
	if len(c.over) > 0 && c.lent < c.loans && (s == nil || c.over[0].precedes(s)) {
		s = c.over[0]
	}
	if s == nil {
		return nil
	}
	return s.queues[0]
}

// offer makes a queue wait for a place.
func (c *class) offer(q *queue) {
	if q.ticket == 0 {
		q.ticket = c.nextTicket()
	}
	s := c.sender(q.waiting[0].Sender, q.ticket)
	q.offered = s
	heap.Push(&s.queues, q)
	c.reposition(s)
}

// withdraw removes a queue from those that wait for a place, if it is among them.
func (c *class) withdraw(q *queue) {
	if s := q.offered; s != nil {
		q.offered = nil
		heap.Remove(&s.queues, q.at)
		c.reposition(s)
	}
}

// hold counts a room as in progress for a sender.
func (c *class) hold(hash uint64) *sender {
	s := c.sender(hash, 0)
	if s.holds >= c.share {
		c.lent++
	}
	s.holds++
	s.ticket = c.nextTicket()
	c.reposition(s)
	return s
}

// drop undoes hold.
func (c *class) drop(s *sender) {
	s.holds--
	if s.holds >= c.share {
		c.lent--
	}
	s.ticket = c.nextTicket()
	c.reposition(s)
}

// sender returns what is known of a user. A new entry gets the given ticket: a room that is busy with other timers withdraws its queue
// again and again, and the sender must keep its place in the order.
func (c *class) sender(hash, ticket uint64) *sender {
	s := c.senders[hash]
	if s == nil {
		s = &sender{class: c, hash: hash, ticket: ticket}
		c.senders[hash] = s
	}
	return s
}

func (c *class) nextTicket() uint64 {
	c.lastTicket++
	return c.lastTicket
}

// reposition moves a sender into the right heap after any change, or forgets it.
func (c *class) reposition(s *sender) {
	if s.heap != nil {
		heap.Remove(s.heap, s.at)
		s.heap = nil
	}
	switch {
	case len(s.queues) > 0:
		s.heap = &c.within
		if s.holds >= c.share {
			s.heap = &c.over
		}
		heap.Push(s.heap, s)
	case s.holds == 0:
		delete(c.senders, s.hash)
	}
}

// precedes is the order in which senders get places: by deadline, or by ticket.
func (s *sender) precedes(other *sender) bool {
	if s.class.byTicket {
		return s.ticket < other.ticket
	}
	return s.queues[0].due() < other.queues[0].due()
}

// senderHeap has the next sender in front.
type senderHeap []*sender

func (h senderHeap) Len() int           { return len(h) }
func (h senderHeap) Less(i, j int) bool { return h[i].precedes(h[j]) }
func (h senderHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].at, h[j].at = i, j
}

func (h *senderHeap) Push(x any) {
	s := x.(*sender)
	s.at = len(*h)
	*h = append(*h, s)
}
func (h *senderHeap) Pop() any { return pop((*[]*sender)(h)) }

// queueHeap has the queue with the earliest deadline in front.
type queueHeap []*queue

func (h queueHeap) Len() int           { return len(h) }
func (h queueHeap) Less(i, j int) bool { return h[i].due() < h[j].due() }
func (h queueHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].at, h[j].at = i, j
}

func (h *queueHeap) Push(x any) {
	q := x.(*queue)
	q.at = len(*h)
	*h = append(*h, q)
}
func (h *queueHeap) Pop() any { return pop((*[]*queue)(h)) }

// pop removes the last element, and clears its slot so that it can be garbage-collected.
func pop[T any](all *[]*T) *T {
	last := len(*all) - 1
	x := (*all)[last]
	(*all)[last] = nil
	*all = (*all)[:last]
	return x
}
