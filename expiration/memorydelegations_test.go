package expiration

import (
	"context"
	"fmt"
	"maps"
)

func (s *memoryStore) Delegate(ctx context.Context, d Delegation) (running bool, err error) {
	err = s.do("delegate", func() {
		row, ok := s.rows[d.NID]
		if running = ok && row.Claim == nil && ctx.Err() == nil; !running {
			return
		}
		maps.DeleteFunc(s.delegations, func(_ int64, other Delegation) bool {
			return d.MemberKey != [32]byte{} && other.MemberKey == d.MemberKey
		})
		s.delegations[d.NID] = d
	})
	return running && err == nil, err
}

func (s *memoryStore) NoteSessions(_ context.Context, notes []SessionNote) error {
	return s.do("note sessions", func() {
		for _, n := range notes {
			if d, ok := s.delegations[n.NID]; ok {
				d.Seen, d.RoomSID, d.Phase = n.Seen, n.RoomSID, n.Phase
				s.delegations[n.NID] = d
			}
		}
	})
}

func (s *memoryStore) Delegations(context.Context) (delegations []Delegation, err error) {
	err = s.do("delegations", func() {
		for nid, d := range s.delegations {
			row := s.rows[nid]
			if row.Claim != nil {
				continue
			}
			d.Kept = Kept{Hash: row.TokenHash, Delayed: row.Delayed != nil}
			d.UserID, d.RoomID, d.Duration = row.Event.Sender, row.Event.RoomID, row.Duration
			delegations = append(delegations, d)
		}
	})
	return delegations, err
}

// kept returns the timers that have a delegation and are not claimed.
func (s *memoryStore) kept() (timers []Timer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for nid := range s.delegations {
		if row := s.rows[nid]; row.Claim == nil {
			timers = append(timers, row)
		}
	}
	return timers
}

// wrongDelegations returns what must not be: a delegation without a timer, or two of one member.
func (s *memoryStore) wrongDelegations() (wrong []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	members := map[[32]byte]int64{}
	for nid, d := range s.delegations {
		if _, ok := s.rows[nid]; !ok {
			wrong = append(wrong, fmt.Sprintf("timer %d has ended, and its delegation is still there", nid))
		}
		if other, ok := members[d.MemberKey]; ok && d.MemberKey != [32]byte{} {
			wrong = append(wrong, fmt.Sprintf("timers %d and %d have delegations of one member", nid, other))
		}
		members[d.MemberKey] = nid
	}
	return wrong
}
