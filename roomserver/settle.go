package roomserver

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/matrix-org/gomatrixserverlib"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/inputqueue"
)

const (
	// laneSettles is how long one attempt that a deadline started waits for a room's queue. It is short, because the attempt holds a place
	// that other rooms need. The next attempt goes on waiting.
	laneSettles = 500 * time.Millisecond
	// callerSettles is how long a request that ends or sends an event waits. It is longer than the five seconds in which a room's worker
	// ignores its queue, see dendritefix.QuietRooms.
	callerSettles = 7 * time.Second
	// settlesFor is how long all attempts together wait for a room. Another server can keep the queue busy for ever, so after
	// this time the event is sent in any case.
	settlesFor = 10 * time.Second
	// settleMemory is how long a wait for a room is remembered after the last attempt. It is longer than the longest pause between two
	// attempts.
	settleMemory = time.Minute
	// firstPoll is the pause after the first look at a queue. It doubles with each further look, up to lastPoll.
	firstPoll = 10 * time.Millisecond
	lastPoll  = 250 * time.Millisecond
	// settleWake is the pause between two attempts to wake a room's worker. All attempts that wait for the room share it.
	settleWake = time.Second
	// maxSettled is how many rooms are remembered. It bounds the memory to some ten megabytes.
	maxSettled = 50_000
)

// errUnsettled: the roomserver has not processed the room's queue yet. It is a passing fault.
var errUnsettled = errors.New("the roomserver has not dealt with what came for the room before")

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

// inTurn is wait for an event that is due: it also keeps the order of the room's deadlines.
func (s *settled) inTurn(ctx context.Context, roomID string, deadline time.Time) error {
	err := s.wait(ctx, roomID, laneSettles)
	if s.owes(roomID, deadline, err != nil) {
		return errUnsettled
	}
	return err
}

// wait returns when the roomserver has processed the present contents of a room's queue. The error is errUnsettled if that takes longer
// than patience, but nil if all attempts together have waited for settlesFor.
func (s *settled) wait(ctx context.Context, roomID string, patience time.Duration) error {
	look, empty := s.begin(roomID)
	if empty {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := s.drain(ctx, roomID)
	if err == nil && s.mayBeRedacted(roomID) { // asked last: processing the queue can fetch redactions
		err = s.hear(ctx, roomID)
	}
	switch {
	case err == nil:
		s.dealtWith(roomID, look)
	case s.waited(roomID):
		err = nil
	}
	return err
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

// drain waits until the present contents of a room's queue are processed. It wakes the room's worker if no message is in work.
func (s *settled) drain(ctx context.Context, roomID string) error {
	b, err := s.queues.Backlog(ctx, roomID)
	all := b.Taken + b.Waiting
	for p := firstPoll; err == nil && !b.Empty() && b.Done < all; p = min(2*p, lastPoll) {
		if b.InWork == 0 && s.mayWake(roomID) {
			if err = s.queues.Wake(ctx, roomID); err != nil {
				return err
			}
		}
		if err = pause(ctx, p); err != nil {
			return err
		}
		b, err = s.queues.Backlog(ctx, roomID)
	}
	return err
}

// hear waits until the timers have processed the output stream up to its present end. That is necessary only in room versions in which
// Dendrite does not apply some redactions, see dendritefix.RedactsInContent. In others the room itself shows its redactions.
func (s *settled) hear(ctx context.Context, roomID string) error {
	version, err := s.version(ctx, roomID)
	switch {
	case err != nil: // the database failed, or the room is unknown: Dendrite does not say which
		return fmt.Errorf("%w: looking up the room version: %w", errUnsettled, err)
	case !dendritefix.RedactsInContent(version):
		return nil
	}
	written, err := s.output.written(ctx)
	if err != nil {
		return err
	}
	for p := firstPoll; ; p = min(2*p, lastPoll) {
		heard, err := s.output.heard(ctx)
		if err != nil || heard >= written {
			return err
		}
		if err = pause(ctx, p); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", errUnsettled, ctx.Err())
	case <-time.After(d):
		return nil
	}
}

// settling is a roomserver that builds due events upon everything that arrived before them.
type settling struct {
	expiration.Roomserver
	settled *settled
}

func (s *settling) Close(
	ctx context.Context, e expiration.Event, o expiration.Outcome, sent time.Time, lost bool,
	claim func(context.Context, expiration.SignedEvent) error,
) error {
	if err := s.wait(ctx, e.RoomID, o, sent); err != nil {
		return err
	}
	return s.Roomserver.Close(ctx, e, o, sent, lost, claim)
}

// Send implements expiration.Roomserver.
func (s *settling) Send(
	ctx context.Context, t expiration.Timer, o expiration.Outcome, claim func(context.Context, expiration.Built) error,
) (string, error) {
	if err := s.wait(ctx, t.Event.RoomID, o, t.Deadline); err != nil {
		return "", err
	}
	return s.Roomserver.Send(ctx, t, o, claim)
}

// wait waits for the room's queue. An event that is due waits for its turn; a request does not.
func (s *settling) wait(ctx context.Context, roomID string, o expiration.Outcome, deadline time.Time) error {
	if o == expiration.Ended {
		return s.settled.wait(ctx, roomID, callerSettles)
	}
	return s.settled.inTurn(ctx, roomID, deadline)
}
