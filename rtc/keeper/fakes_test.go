package keeper

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

var errFault = errors.New("a fault on purpose")

// fakeSFU is LiveKit.
type fakeSFU struct {
	mu       sync.Mutex // guards all fields
	rooms    map[string]*fakeRoom
	made     int
	fault    error         // nil: it answers
	hangs    bool          // it answers when the caller gives up
	asked    int           // how many lists of participants were asked for
	at       int           // how many are being asked for now, and at most
	most     int           //
	takes    time.Duration // a list of participants, once it is made
	restarts func()        // if not nil, called once, before a list is made
	removed  []livekit.Participant
	onRemove func(livekit.Participant) error
	panics   bool
	// told is when an answer last had a participant.
	told map[livekit.Participant]time.Time
}

type fakeRoom struct {
	sid      string
	sessions map[string]livekit.Session
}

func newFakeSFU() *fakeSFU {
	return &fakeSFU{rooms: map[string]*fakeRoom{}, told: map[livekit.Participant]time.Time{}}
}

func (s *fakeSFU) reach(ctx context.Context) error {
	s.mu.Lock()
	hangs, fault, panics := s.hangs, s.fault, s.panics
	s.mu.Unlock()
	if panics {
		panic("on purpose")
	}
	if hangs {
		<-ctx.Done()
		return ctx.Err()
	}
	return fault
}

func (s *fakeSFU) CreateRoom(ctx context.Context, name string) (livekit.Room, error) {
	if err := s.reach(ctx); err != nil {
		return livekit.Room{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return livekit.Room{SID: s.roomWithMu(name).sid, Name: name}, nil
}

func (s *fakeSFU) roomWithMu(name string) *fakeRoom {
	if s.rooms[name] == nil {
		s.made++
		s.rooms[name] = &fakeRoom{sid: fmt.Sprintf("RM_%d", s.made), sessions: map[string]livekit.Session{}}
	}
	return s.rooms[name]
}

func (s *fakeSFU) Room(ctx context.Context, name string) (livekit.Room, error) {
	if err := s.reach(ctx); err != nil {
		return livekit.Room{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rooms[name] == nil {
		return livekit.Room{}, fmt.Errorf("wrapped: %w", livekit.ErrNotFound)
	}
	return livekit.Room{SID: s.rooms[name].sid, Name: name}, nil
}

func (s *fakeSFU) Participants(ctx context.Context, name string) (sessions []livekit.Session, err error) {
	if err = s.reach(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	if restart := s.restarts; restart != nil {
		s.restarts = nil
		restart()
	}
	s.asked++
	s.at++
	s.most = max(s.most, s.at)
	if room := s.rooms[name]; room != nil {
		sessions = slices.Collect(maps.Values(room.sessions))
	}
	for _, p := range sessions {
		s.told[livekit.Participant{Room: name, Identity: p.Identity}] = time.Now()
	}
	takes := s.takes
	s.mu.Unlock()
	time.Sleep(takes)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at--
	return sessions, nil
}

func (s *fakeSFU) Remove(ctx context.Context, p livekit.Participant) error {
	if err := s.reach(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.onRemove != nil {
		if err := s.onRemove(p); err != nil {
			return err
		}
	}
	room := s.rooms[p.Room]
	if room == nil || room.sessions[p.Identity].SID == "" {
		return livekit.ErrNotFound
	}
	delete(room.sessions, p.Identity)
	s.removed = append(s.removed, p)
	return nil
}

// set changes something.
func (s *fakeSFU) set(change func(s *fakeSFU)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

// enter connects a participant, if its room is there, which it reports.
func (s *fakeSFU) enter(p livekit.Participant, state livekit.State) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	room := s.rooms[p.Room]
	if room == nil || s.fault != nil || s.hangs {
		return false
	}
	s.made++
	room.sessions[p.Identity] = livekit.Session{SID: fmt.Sprintf("PA_%d", s.made), Identity: p.Identity, State: state}
	return true
}

// exit disconnects a participant.
func (s *fakeSFU) exit(p livekit.Participant) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if room := s.rooms[p.Room]; room != nil {
		delete(room.sessions, p.Identity)
	}
}

// has reports whether a participant is connected.
func (s *fakeSFU) has(p livekit.Participant) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	room := s.rooms[p.Room]
	return room != nil && room.sessions[p.Identity].SID != ""
}

func (s *fakeSFU) toldAt(p livekit.Participant) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.told[p]
}

func (s *fakeSFU) sid(room string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rooms[room] == nil {
		return ""
	}
	return s.rooms[room].sid
}

// fakeTimers is the engine, with its database, which outlives the process.
type fakeTimers struct {
	mu       sync.Mutex // guards all fields
	timers   map[expiration.Kept]*fakeTimer
	rows     map[int64]expiration.Delegation
	fail     func(operation string) error // nil: nothing fails
	written  bool                         // what fails is done nevertheless
	takes    map[string]time.Duration     // by operation
	down     bool                         // no process
	lastNID  int64
	problems []string
	onKeep   func(expiration.Kept) // before a restart
	onGone   func(expiration.Kept) // after a row says gone
	mostEnds int
	ends     int
}

type fakeTimer struct {
	row      expiration.Delegation // of Find
	deadline time.Time
	restarts []time.Time
	// ended is how the timer has ended, or "": expired, finished, cancelled. endedAt is when.
	ended   string
	endedAt time.Time
}

func newFakeTimers() *fakeTimers {
	return &fakeTimers{timers: map[expiration.Kept]*fakeTimer{}, rows: map[int64]expiration.Delegation{}, takes: map[string]time.Duration{}}
}

// schedule adds a timer.
func (f *fakeTimers) schedule(k expiration.Kept, user, room string, d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lastNID++
	f.timers[k] = &fakeTimer{
		row:      expiration.Delegation{NID: f.lastNID, Kept: k, UserID: user, RoomID: room, Duration: d},
		deadline: time.Now().Add(d),
	}
}

// passWithMu ends the timers whose deadlines have passed, as the engine does.
func (f *fakeTimers) passWithMu() {
	now := time.Now()
	if f.down || f.fail != nil && f.fail("expire") != nil {
		return
	}
	for _, tm := range f.timers {
		if tm.ended == "" && !now.Before(tm.deadline) {
			f.endWithMu(tm, "expired", tm.deadline)
		}
	}
}

func (f *fakeTimers) endWithMu(tm *fakeTimer, how string, at time.Time) {
	tm.ended, tm.endedAt = how, at
	delete(f.rows, tm.row.NID)
}

// stop ends the process, and start begins the next one.
func (f *fakeTimers) stop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.passWithMu()
	f.down = true
}

func (f *fakeTimers) start() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down = false
	for _, tm := range f.timers {
		if least := time.Now().Add(30 * time.Second); tm.deadline.Before(least) {
			tm.deadline = least
		}
	}
}

// set changes something. What was due before has ended before.
func (f *fakeTimers) set(change func(f *fakeTimers)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.passWithMu()
	change(f)
	f.passWithMu()
}

// end ends a timer as its owner does.
func (f *fakeTimers) end(k expiration.Kept) {
	f.set(func(f *fakeTimers) {
		if tm := f.timers[k]; tm.ended == "" {
			f.endWithMu(tm, "cancelled", time.Now())
		}
	})
}

// of returns a copy of a timer.
func (f *fakeTimers) of(k expiration.Kept) fakeTimer {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.passWithMu()
	return *f.timers[k]
}

// rowOf returns the delegation's row of a timer, if there is one.
func (f *fakeTimers) rowOf(k expiration.Kept) (expiration.Delegation, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.passWithMu()
	row, ok := f.rows[f.timers[k].row.NID]
	return row, ok
}

// call begins an operation. act is called under the mutex, unless the operation fails.
func (f *fakeTimers) call(operation string, act func() error) error {
	f.mu.Lock()
	takes := f.takes[operation]
	f.mu.Unlock()
	time.Sleep(takes)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.passWithMu()
	var fault error
	if f.fail != nil {
		fault = f.fail(operation)
	}
	if f.down {
		fault = errors.New("the process is dead")
	}
	if fault != nil && (!f.written || f.down) {
		return fault
	}
	return errors.Join(fault, act())
}

func (f *fakeTimers) runningWithMu(k expiration.Kept) *fakeTimer {
	if tm := f.timers[k]; tm != nil && tm.ended == "" {
		return tm
	}
	return nil
}

func (f *fakeTimers) Find(_ context.Context, k expiration.Kept, owner, roomID string) (row expiration.Delegation, err error) {
	err = f.call("find", func() error {
		tm := f.runningWithMu(k)
		if tm == nil || owner != "" && owner != tm.row.UserID || roomID != "" && roomID != tm.row.RoomID {
			return expiration.ErrNotFound
		}
		row = tm.row
		return nil
	})
	return row, err
}

func (f *fakeTimers) Delegate(_ context.Context, d expiration.Delegation) error {
	return f.call("delegate", func() error {
		tm := f.runningWithMu(d.Kept)
		if tm == nil {
			return expiration.ErrNotFound
		}
		if d.MemberKey != [32]byte{} {
			maps.DeleteFunc(f.rows, func(_ int64, o expiration.Delegation) bool { return o.MemberKey == d.MemberKey })
		}
		f.rows[tm.row.NID] = d
		return nil
	})
}

func (f *fakeTimers) Delegations(context.Context) (rows []expiration.Delegation, err error) {
	err = f.call("delegations", func() error {
		rows = slices.Collect(maps.Values(f.rows))
		return nil
	})
	return rows, err
}

func (f *fakeTimers) NoteSession(_ context.Context, notes []expiration.SessionNote) error {
	return f.call("note", func() error {
		for _, n := range notes {
			if row, ok := f.rows[n.NID]; ok {
				row.Phase, row.Seen, row.RoomSID = n.Phase, n.Seen, n.RoomSID
				f.rows[n.NID] = row
				if f.onGone != nil && n.Phase == expiration.DelegationGone {
					f.onGone(row.Kept)
				}
			}
		}
		return nil
	})
}

func (f *fakeTimers) KeepAlive(_ context.Context, k expiration.Kept) error {
	return f.call("keep", func() error {
		tm := f.runningWithMu(k)
		if tm == nil {
			return expiration.ErrNotFound
		}
		if f.rows[tm.row.NID].Phase == expiration.DelegationGone {
			f.problems = append(f.problems, fmt.Sprintf("timer %d was restarted after its participant was gone", tm.row.NID))
		}
		if f.onKeep != nil {
			f.onKeep(k)
		}
		tm.restarts = append(tm.restarts, time.Now())
		tm.deadline = time.Now().Add(tm.row.Duration)
		return nil
	})
}

// Supersede treats all delayed events as events for the same state.
func (f *fakeTimers) Supersede(_ context.Context, older, newer expiration.Kept) error {
	return f.call("supersede", func() error {
		if tm := f.runningWithMu(older); tm != nil && older.Delayed && newer.Delayed {
			tm.ended, tm.endedAt = "cancelled", time.Now()
		}
		return nil
	})
}

func (f *fakeTimers) Finish(_ context.Context, k expiration.Kept) error {
	f.mu.Lock()
	f.ends++
	f.mostEnds = max(f.mostEnds, f.ends)
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.ends--
	}()
	return f.call("finish", func() error {
		tm := f.runningWithMu(k)
		if tm == nil {
			return expiration.ErrNotFound
		}
		if row := f.rows[tm.row.NID]; row.Phase != expiration.DelegationGone {
			f.problems = append(f.problems, fmt.Sprintf("timer %d was ended, and its row says %q", tm.row.NID, row.Phase))
		}
		f.endWithMu(tm, "finished", time.Now())
		return nil
	})
}

// fakeStore is a Store.
type fakeStore struct {
	mu      sync.Mutex // guards all fields
	members map[livekit.Participant]expiration.Member
	fault   error
	before  func(operation string)
	pruned  time.Time
}

func newFakeStore() *fakeStore {
	return &fakeStore{members: map[livekit.Participant]expiration.Member{}}
}

func (s *fakeStore) call(operation string, act func() error) error {
	s.mu.Lock()
	before := s.before
	s.mu.Unlock()
	if before != nil {
		before(operation)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fault != nil {
		return s.fault
	}
	return act()
}

func (s *fakeStore) Remember(_ context.Context, m expiration.Member) error {
	return s.call("remember", func() error {
		m.Leaving = false
		s.members[livekit.Participant{Room: m.Room, Identity: m.Identity}] = m
		return nil
	})
}

func (s *fakeStore) which(is func(expiration.Member) bool) (members []expiration.Member) {
	for _, m := range s.members {
		if is(m) {
			members = append(members, m)
		}
	}
	return members
}

func (s *fakeStore) MembersOf(_ context.Context, roomID, userID string) (members []expiration.Member, err error) {
	err = s.call("members", func() error {
		members = s.which(func(m expiration.Member) bool { return m.RoomID == roomID && m.UserID == userID })
		return nil
	})
	return members, err
}

func (s *fakeStore) MemberAt(_ context.Context, room, identity string) (m expiration.Member, err error) {
	err = s.call("member", func() (err error) {
		var ok bool
		if m, ok = s.members[livekit.Participant{Room: room, Identity: identity}]; !ok {
			err = expiration.ErrNotFound
		}
		return err
	})
	return m, err
}

func (s *fakeStore) MarkLeaving(_ context.Context, roomID, userID string) error {
	return s.call("mark", func() error {
		for p, m := range s.members {
			if m.RoomID == roomID && m.UserID == userID {
				m.Leaving = true
				s.members[p] = m
			}
		}
		return nil
	})
}

func (s *fakeStore) Leaving(context.Context) (members []expiration.Member, err error) {
	err = s.call("leaving", func() error {
		members = s.which(func(m expiration.Member) bool { return m.Leaving })
		return nil
	})
	return members, err
}

func (s *fakeStore) Forget(_ context.Context, m expiration.Member) error {
	return s.call("forget", func() error {
		p := livekit.Participant{Room: m.Room, Identity: m.Identity}
		if s.members[p].Made.Equal(m.Made) {
			delete(s.members, p)
		}
		return nil
	})
}

func (s *fakeStore) Prune(_ context.Context, before time.Time) error {
	return s.call("prune", func() error {
		s.pruned = before
		maps.DeleteFunc(s.members, func(_ livekit.Participant, m expiration.Member) bool { return !m.Leaving && m.Made.Before(before) })
		return nil
	})
}

// fakeRooms are the rooms of Matrix.
type fakeRooms struct {
	mu    sync.Mutex // guards both fields
	out   map[[2]string]bool
	fault error
}

func (r *fakeRooms) Joined(_ context.Context, roomID, userID string) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.out[[2]string{roomID, userID}], r.fault
}

func (r *fakeRooms) set(roomID, userID string, joined bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.out[[2]string{roomID, userID}] = !joined
}
