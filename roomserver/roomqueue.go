package roomserver

import (
	"context"
	"sync"
	"time"

	"github.com/matrix-org/gomatrixserverlib"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/inputqueue"
)

// settled remembers the rooms whose queues are empty.
//
// Dendrite answers a federation transaction before the roomserver has processed its events. Without a wait, an event that is due would be
// built without them. It would overwrite newer state, although the other server got its answer before. A room counts as empty after a look
// into its queue, until an event arrives asynchronously. So a room with only local users costs one look after each start of the process.
type settled struct {
	queues queues
	output output
	// version returns the version of a room.
	version func(ctx context.Context, roomID string) (gomatrixserverlib.RoomVersion, error)

	mu    sync.Mutex // guards what follows, and each roomQueue
	rooms map[string]*roomQueue
	looks uint64 // counts up, see roomQueue.look
}

// roomQueue is the knowledge about one room.
type roomQueue struct {
	// look changes each time an event arrives. It makes the result of a look that began before void.
	look  uint64
	empty bool
	// redacted: a redaction may have arrived since the queue was seen to be empty. It is set for a new room.
	redacted bool
	// since and last are the times at which the first and the last attempt found something in the queue.
	since, last time.Time
	woken       time.Time
	// owed is the earliest deadline whose attempt has waited in vain, and owedAt is when it did. Later deadlines of the room wait until
	// that attempt is repeated, or settlesFor is over. So the order of the deadlines holds.
	owed, owedAt time.Time
}

// queues are the roomserver's queues, one for each room.
type queues interface {
	Backlog(ctx context.Context, roomID string) (inputqueue.Backlog, error)
	Wake(ctx context.Context, roomID string) error
}

// output is the roomserver's output stream: the number of the last message in it, and the number up to which the timers have processed it.
type output interface {
	written(ctx context.Context) (uint64, error)
	heard(ctx context.Context) (uint64, error)
}

func newSettled(
	q queues, o output, version func(ctx context.Context, roomID string) (gomatrixserverlib.RoomVersion, error),
) *settled {
	return &settled{queues: q, output: o, version: version, rooms: map[string]*roomQueue{}}
}

// forget notes that an event has arrived for a room.
func (s *settled) forget(roomID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.rooms[roomID]; r != nil {
		s.looks++
		r.look, r.empty = s.looks, false
	}
}

// redacted notes that a redaction has arrived for a room, either as input or fetched from another server.
func (s *settled) redacted(roomID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.rooms[roomID]; r != nil {
		s.looks++
		r.look, r.empty, r.redacted = s.looks, false, true
	}
}

// begin begins a look at a room's queue, unless no event has arrived since the queue was seen to be empty.
func (s *settled) begin(roomID string) (look uint64, empty bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.rooms[roomID]
	if r == nil {
		for other := range s.rooms { // a room that is removed is looked at again
			if len(s.rooms) < maxSettled {
				break
			}
			delete(s.rooms, other)
		}
		s.looks++
		r = &roomQueue{look: s.looks, redacted: true}
		s.rooms[roomID] = r
	}
	return r.look, r.empty
}

// dealtWith notes that the roomserver has processed everything that was in a room's queue when a look began.
func (s *settled) dealtWith(roomID string, look uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.rooms[roomID]; r != nil {
		if r.empty = r.look == look; r.empty {
			r.redacted = false
		}
		r.since, r.last = time.Time{}, time.Time{}
	}
}

// waited notes that an attempt waited for a room's queue in vain. It reports whether all attempts together have waited long enough.
func (s *settled) waited(roomID string) bool {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.rooms[roomID]
	if r == nil {
		return false
	}
	if now.Sub(r.last) > settleMemory {
		r.since = now
	}
	r.last = now
	return now.Sub(r.since) >= settlesFor
}

// owes reports whether an event with an earlier deadline comes first in its room. It also notes the outcome of this attempt: it waited in
// vain, or it goes ahead.
func (s *settled) owes(roomID string, deadline time.Time, failed bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.rooms[roomID]
	switch {
	case r == nil:
	case failed && (r.owed.IsZero() || deadline.Before(r.owed)):
		r.owed, r.owedAt = deadline, time.Now()
	case failed || r.owed.IsZero():
	case deadline.After(r.owed) && time.Since(r.owedAt) < settlesFor:
		return true
	default:
		r.owed = time.Time{}
	}
	return false
}

// mayBeRedacted reports whether a redaction may have arrived for a room.
func (s *settled) mayBeRedacted(roomID string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.rooms[roomID]
	return r == nil || r.redacted
}

// mayWake reports whether a room's worker is to be woken now. If so, it notes the time.
func (s *settled) mayWake(roomID string) bool {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.rooms[roomID]
	if r == nil || now.Sub(r.woken) < settleWake {
		return false
	}
	r.woken = now
	return true
}
