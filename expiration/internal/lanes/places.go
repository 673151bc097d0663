package lanes

import (
	"container/heap"
	"time"
)

// The bounds on what is in progress at the same time. A place is the right of one room to have timers attempted. Together
// they are 84 rooms: fewer than the 90 connections to PostgreSQL of Dendrite's sample configuration, see Places.
const (
	// Places is in how many rooms timers are closed at the same time, but for retries and attempts that overrun, see RetryPlaces.
	// They mostly wait for the roomserver, or for a commit: the more of them there are, the more is committed at once. Dendrite's
	// sample configuration has 90 connections to PostgreSQL, of which the roomserver needs two for an event now and then: if there
	// were as many rooms as connections, all would wait for the second.
	Places = 64
	// RetryPlaces is how many places there are for retries, apart from the Places places for first attempts. So neither class
	// ever waits for the other. More are not needed: eight rooms at a time are nearly as fast as all (docs/performance.md).
	RetryPlaces = 8
	// PlacePatience is how long a first attempt holds its place. A roomserver that works answers within a second, and a timer that
	// waits for the place is then still closed within about two.
	PlacePatience = 2 * time.Second
	// maxOvertime is how many attempts may go on without a place. It is small, because a slow database makes all attempts overrun,
	// and then each of them does hold a connection. While it is reached, places are kept until an attempt ends.
	maxOvertime = 12
	// senderShare is how many places one sender's first attempts may always hold, and maxLoans how many places are lent, to all senders
	// together, to those who have due timers in more rooms. So one user's mass expiry gets ten places, and ten users whose attempts
	// all hang get 28 of 64. More would gain little, see RetryPlaces, and everybody else's events would share the processors with them.
	senderShare = 2
	maxLoans    = 8
	// retryShare and maxRetryLoans are the same for retries: one sender holds five of eight places at the most.
	retryShare    = 1
	maxRetryLoans = 4
	// retryEvery is after how many first attempts in a room a retry may come before the next one, so that it does not wait for ever.
	retryEvery = 8
	// hungFor is for how long a sender's timers are treated as retries after one of its attempts overran its place and failed. It is
	// longer than ten such senders need to have one attempt each with RetryPlaces, so that none of them is forgotten meanwhile.
	hungFor = 2 * time.Minute
)

// class is a number of places, with the rooms that wait for one. Its senders are either within their share, or over it, and then
// need a loan. To find the room that is next takes the first of two heaps, however many wait. Lanes.mu guards it.
type class struct {
	free         int                // places that no room holds
	share        int                // how many rooms of one sender can be in progress without a loan
	loans        int                // how many loans there can be
	lent         int                // how many there are
	byTicket     bool               // the sender is next who has waited longest, not the one with the earliest deadline
	lastTicket   uint64             // the last number given to a sender
	senders      map[uint64]*sender // those with rooms that wait or are in progress, by hash
	within, over senderHeap         // those with rooms that wait
}

// sender is what a class knows of a user. Its rooms are those in which the next timer, or the one in progress, is the user's.
type sender struct {
	class  *class
	hash   uint64
	queues queueHeap   // those that wait for a place
	holds  int         // how many rooms are in progress, overtime included
	ticket uint64      // grows each time that the sender comes to wait, gets a place or gives it back
	heap   *senderHeap // class.within, class.over or nil
	at     int         // the index in it
}

func newClass(places, share, loans int) class {
	return class{free: places, share: share, loans: loans, senders: map[uint64]*sender{}}
}

// next returns the queue that is to get a place, or nil if there is none, or no place.
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

// offer lets a queue wait for a place.
func (c *class) offer(q *queue) {
	if q.ticket == 0 {
		q.ticket = c.nextTicket()
	}
	s := c.sender(q.waiting[0].Sender, q.ticket)
	q.offered = s
	heap.Push(&s.queues, q)
	c.reposition(s)
}

// withdraw ends the waiting of a queue, if it waits.
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

// drop ends what hold began.
func (c *class) drop(s *sender) {
	s.holds--
	if s.holds >= c.share {
		c.lent--
	}
	s.ticket = c.nextTicket()
	c.reposition(s)
}

// sender returns what is known of a user. One of whom nothing is known has this turn: a room that is busy with other timers withdraws
// its queue again and again, which must not cost the turn.
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

// settle puts a sender where it belongs, after any change, or forgets it.
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

// precedes is the order in which senders get places: that of the earliest deadlines, or in turns.
func (s *sender) precedes(other *sender) bool {
	if s.class.byTicket {
		return s.ticket < other.ticket
	}
	return s.queues[0].due() < other.queues[0].due()
}

// senderHeap has the sender in front who is next.
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

// pop takes the last element, and leaves no pointer to it behind.
func pop[T any](all *[]*T) *T {
	last := len(*all) - 1
	x := (*all)[last]
	(*all)[last] = nil
	*all = (*all)[:last]
	return x
}
