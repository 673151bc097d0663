package expiration

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

var errFault = errors.New("a passing fault")

// memoryStore is a Store that lasts as long as the test. The suite in package storage tests the real ones.
type memoryStore struct {
	mu        sync.Mutex
	rows      map[int64]Timer
	digests   map[int64]Digest
	finalised []DelayedEvent
	// delegations are those of rows, by the rows' numbers.
	delegations map[int64]Delegation
	// fail is called before each operation, and its error is the operation's. If after is set, the operation is done nevertheless.
	fail  func(operation string) error
	after bool
	// deleteTakes is how long deletions take. insertTakes is how long insertions take, before or after the row is written.
	deleteTakes, insertTakes time.Duration
	insertAfter              bool
	// held is not nil while operations wait for it to be closed, regardless of their contexts. waiting is the number of those operations.
	held    chan struct{}
	waiting int
	prunes  int
}

// setInsertTakes makes insertions slow, before or after the row is written.
func (s *memoryStore) setInsertTakes(d time.Duration, after bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.insertTakes, s.insertAfter = d, after
}

// hold makes the store hang, and returns the function that ends that.
func (s *memoryStore) hold() (release func()) {
	held := make(chan struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = held
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.held = nil
		close(held)
	}
}

// hanging returns the number of operations that hang.
func (s *memoryStore) hanging() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting
}

// pruned returns how many times the store was pruned.
func (s *memoryStore) pruned() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.prunes
}

// row returns the row of a timer, or nil.
func (s *memoryStore) row(nid int64) *Timer {
	s.mu.Lock()
	defer s.mu.Unlock()
	if row, ok := s.rows[nid]; ok {
		return &row
	}
	return nil
}

// wait is called before each operation.
func (s *memoryStore) wait() {
	s.mu.Lock()
	held := s.held
	if held != nil {
		s.waiting++
	}
	s.mu.Unlock()
	if held != nil {
		<-held
		s.mu.Lock()
		s.waiting--
		s.mu.Unlock()
	}
}

// set changes the fields above while the engine runs.
func (s *memoryStore) set(after bool, fail func(operation string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.after, s.fail = after, fail
}

func (s *memoryStore) setDeleteTakes(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deleteTakes = d
}

func newMemoryStore() *memoryStore {
	return &memoryStore{rows: map[int64]Timer{}, digests: map[int64]Digest{}, delegations: map[int64]Delegation{}}
}

func (s *memoryStore) do(operation string, f func()) error {
	s.wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	if s.fail != nil {
		err = s.fail(operation)
	}
	if err == nil || s.after {
		f()
	}
	return err
}

func (s *memoryStore) Insert(_ context.Context, t Timer, d Digest) error {
	s.mu.Lock()
	takes, after := s.insertTakes, s.insertAfter
	s.mu.Unlock()
	if !after {
		time.Sleep(takes)
	}
	err := s.do("insert", func() { s.rows[t.NID], s.digests[t.NID] = t, d })
	if after {
		time.Sleep(takes)
	}
	return err
}

func (s *memoryStore) Refresh(_ context.Context, refreshes []Refresh) ([]bool, error) {
	found := make([]bool, len(refreshes))
	err := s.do("refresh", func() {
		for i, r := range refreshes {
			row, ok := s.rows[r.NID]
			if found[i] = ok && row.Claim == nil; found[i] {
				row.Duration, row.Deadline = r.Duration, r.Deadline
				s.rows[r.NID] = row
			}
		}
	})
	return found, err
}

func (s *memoryStore) Claim(_ context.Context, claims []ConditionalClaim) ([]bool, error) {
	found := make([]bool, len(claims))
	err := s.do("claim", func() {
		for i, c := range claims {
			row, ok := s.rows[c.NID]
			if found[i] = ok && row.Claim == nil && row.Deadline.Equal(c.Deadline); found[i] {
				row.Claim = &c.Claim
				s.rows[c.NID] = row
			}
		}
	})
	return found, err
}

func (s *memoryStore) Doubt(_ context.Context, nids []int64) error {
	return s.do("doubt", func() {
		for _, nid := range nids {
			delete(s.digests, nid)
		}
	})
}

func (s *memoryStore) Drop(_ context.Context, nids []int64) error {
	return s.do("drop", func() {
		for _, nid := range nids {
			if s.rows[nid].Claim == nil {
				s.removeUnderMu(nid)
			}
		}
	})
}

func (s *memoryStore) Delete(_ context.Context, nids []int64) error {
	s.mu.Lock()
	takes := s.deleteTakes
	s.mu.Unlock()
	time.Sleep(takes)
	return s.do("delete", func() {
		for _, nid := range nids {
			s.removeUnderMu(nid)
		}
	})
}

// removeUnderMu removes a row and its delegation.
func (s *memoryStore) removeUnderMu(nid int64) {
	delete(s.rows, nid)
	delete(s.delegations, nid)
}

func (s *memoryStore) Finalise(_ context.Context, nid int64, f Final, running bool, keep int) (done bool, err error) {
	err = s.do("finalise", func() {
		row, ok := s.rows[nid]
		if done = ok && row.Delayed != nil && (row.Claim == nil || !running); !done {
			return
		}
		s.removeUnderMu(nid)
		s.finalised = append(s.finalised, DelayedEvent{Timer: row, Final: &f})
		extra := -keep
		for _, d := range s.finalised {
			if d.Timer.Event.Sender == row.Event.Sender {
				extra++
			}
		}
		s.finalised = slices.DeleteFunc(s.finalised, func(d DelayedEvent) bool {
			extra--
			return extra >= 0 && d.Timer.Event.Sender == row.Event.Sender
		})
	})
	return done && err == nil, err
}

// lookup returns the first finalised event that matches, or ErrNotFound.
func (s *memoryStore) lookup(has func(DelayedEvent) bool) (d DelayedEvent, err error) {
	err = s.do("finalised", func() {
		if i := slices.IndexFunc(s.finalised, has); i >= 0 {
			d = s.finalised[i]
		}
	})
	if err == nil && d.Final == nil {
		err = ErrNotFound
	}
	return d, err
}

func (s *memoryStore) Finalised(_ context.Context, h TokenHash) (DelayedEvent, error) {
	return s.lookup(func(d DelayedEvent) bool { return d.Timer.TokenHash == h })
}

func (s *memoryStore) FinalisedAs(_ context.Context, sender string, eventIDs []string) (map[string]string, error) {
	rowIDs := map[string]string{}
	err := s.do("finalised as", func() {
		for _, d := range slices.Backward(s.finalised) {
			if d.Timer.Event.Sender == sender && slices.Contains(eventIDs, d.Final.EventID) && !d.Final.Existed {
				rowIDs[d.Final.EventID] = d.Timer.Event.ID
			}
		}
	})
	return rowIDs, err
}

func (s *memoryStore) FinalisedSenders(context.Context) (senders []string, err error) {
	err = s.do("senders", func() {
		for _, d := range s.finalised {
			if d.Final.Sent() {
				senders = append(senders, d.Timer.Event.Sender)
			}
		}
	})
	return senders, err
}

func (s *memoryStore) Requested(_ context.Context, h RequestHash) (rowID string, err error) {
	has := func(e Event) bool { return e.Request != nil && e.Request.Hash == h }
	err = s.do("requested", func() {
		for _, row := range s.rows {
			if row.Delayed != nil && has(row.Event) {
				rowID = row.Event.ID
			}
		}
		for _, d := range s.finalised {
			if has(d.Timer.Event) {
				rowID = d.Timer.Event.ID
			}
		}
	})
	if err == nil && rowID == "" {
		err = ErrNotFound
	}
	return rowID, err
}

func (s *memoryStore) Prune(_ context.Context, before time.Time) error {
	return s.do("prune", func() {
		s.prunes++
		s.finalised = slices.DeleteFunc(s.finalised, func(d DelayedEvent) bool { return d.Final.At.Before(before) })
	})
}

func (s *memoryStore) Erase(_ context.Context, sender string) error {
	return s.do("erase", func() {
		s.finalised = slices.DeleteFunc(s.finalised, func(d DelayedEvent) bool { return d.Timer.Event.Sender == sender })
	})
}

func (s *memoryStore) Read(_ context.Context, nids []int64) ([]*Timer, error) {
	rows := make([]*Timer, len(nids))
	err := s.do("read", func() {
		for i, nid := range nids {
			if row, ok := s.rows[nid]; ok {
				rows[i] = &row
			}
		}
	})
	return rows, err
}

func (s *memoryStore) Index(_ context.Context, f func(Indexed) error) error {
	var rows []Indexed
	if err := s.do("index", func() {
		for nid, row := range s.rows {
			_, kept := s.delegations[nid]
			rows = append(rows, Indexed{
				NID: nid, Digest: s.digests[nid], Claimed: row.Claim != nil, Kept: kept, Duration: row.Duration, Deadline: row.Deadline,
			})
		}
	}); err != nil {
		return err
	}
	for _, row := range rows {
		if err := f(row); err != nil {
			return err
		}
	}
	return nil
}

func (s *memoryStore) Ping(context.Context) error { return s.do("ping", func() {}) }

func (s *memoryStore) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.rows)
}

// has reports whether an event has a row, and whether the next start will doubt it.
func (s *memoryStore) has(eventID string) (exists, doubted bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for nid, row := range s.rows {
		if row.Event.ID == eventID {
			_, sure := s.digests[nid]
			return true, !sure
		}
	}
	return false, false
}

// failing makes some operations of the store fail.
func failing(operations ...string) func(string) error {
	return func(o string) error {
		for _, operation := range operations {
			if o == operation {
				return errFault
			}
		}
		return nil
	}
}
