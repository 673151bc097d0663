package expiration

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// TestMachine plays random scripts, and compares what the engine does with the guarantees in doc.go. A script that fails is shrunk before
// it is shown.
func TestMachine(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			rapid.Check(t, func(rt *rapid.T) {
				script := rapid.SliceOfN(actions(mode.calm), 1, 30).Draw(rt, "script")
				if mode.slow {
					script = slices.Insert(script, 0, slowInsert(rt))
				}
				var problems []string
				synctest.Test(t, func(t *testing.T) { problems = play(t, mode.calm && !mode.slow, script) })
				if len(problems) > 0 {
					rt.Log(strings.Join(problems, "\n"))
					rt.Fatalf("a guarantee was broken") // a constant text, so that shrinking accepts shorter scripts
				}
			})
		})
	}
}

// machine plays a script.
type machine struct {
	w     *world
	calm  bool
	lives []*life
	ends  sync.WaitGroup // calls of End in progress, and sends while the store is slow
	// orphans: the store may have rows of events that were never sent.
	orphans bool
	broken  map[string]action // the faults at present

	mu       sync.Mutex // guards problems, lives and orphans, and the changing fields of each life
	problems []string
}

// play plays a script and returns the problems.
func play(t *testing.T, calm bool, script []action) []string {
	m := &machine{calm: calm, broken: map[string]action{}}
	m.w = &world{t: t, store: newMemoryStore(), roomserver: newFakeRoomserver()}
	m.w.start(Config{MaxRunningPerUser: 100})
	for _, a := range script {
		m.act(a)
		synctest.Wait()
		m.checkIndex()
		m.checkClosings()
	}
	m.finish()
	m.w.Stop()
	return m.problems
}

func (m *machine) problem(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.problems = append(m.problems, fmt.Sprintf(format, args...))
}

func (m *machine) act(a action) {
	switch a.do {
	case "sleep":
		time.Sleep(a.long)
	case "send":
		e := m.place(a)
		if _, slow := m.broken["slow insert"]; slow { // the script goes on meanwhile
			m.ends.Go(func() { m.send(a, e) })
			return
		}
		m.send(a, e)
	case "lose", "store":
		m.send(a, m.place(a))
	case "faults":
		m.broken[a.fault] = a
		m.setFaults()
	case "slow insert":
		m.broken[a.do] = a
		m.setFaults()
	case "heal":
		clear(m.broken)
		m.setFaults()
	case "crash":
		m.crash(a.long)
	case "replace":
		m.replace(a)
	case "purge":
		room := m.place(a).RoomID
		m.stop(RoomGone, func(l *life) bool { return l.event.RoomID == room })
		m.w.DropRoom(m.w.t.Context(), room)
	case "leave":
		time.Sleep(time.Millisecond) // the database keeps whole milliseconds
		e := m.place(a)
		m.stop(SenderGone, func(l *life) bool { return l.event.RoomID == e.RoomID && l.event.Sender == e.Sender })
		m.w.DropSender(m.w.t.Context(), e.RoomID, e.Sender, time.Now())
	case "change": // reports a change without naming it
		if err := m.w.RoomChanged(m.w.t.Context(), m.place(a).RoomID); err != nil {
			m.failed(err)
		}
	default:
		if lives := m.all(); len(lives) > 0 {
			// Usually one of the newest.
			m.actOn(a, lives[max(0, len(lives)-1-a.which/2)])
		}
	}
}

// actOn does what act does, for actions on an event.
func (m *machine) actOn(a action, l *life) {
	ctx := m.w.t.Context()
	if m.now(l).pending && a.do != "redact" && a.do != "replace remotely" {
		return
	}
	switch a.do {
	case "refresh":
		m.refreshed(l, l.duration, m.w.Refresh(ctx, l.hash))
	case "overtake": // a refresh during the building of the closing event
		m.broken["slow build"] = a
		m.setFaults()
		time.Sleep(time.Until(l.earliest.Add(time.Millisecond)))
		m.refreshed(l, l.duration, m.w.Refresh(ctx, l.hash))
	case "repeat":
		m.repeat(l, a.long)
	case "end":
		m.ends.Go(func() { m.end(l, func() error { return m.w.End(ctx, l.hash) }) })
	case "delegate":
		m.delegate(l, byte(a.which))
	case "keep alive":
		m.refreshed(l, l.duration, m.w.KeepAlive(ctx, Kept{Hash: l.hash}))
	case "finish":
		m.ends.Go(func() { m.end(l, func() error { return m.w.Finish(ctx, Kept{Hash: l.hash}) }) })
	case "redact":
		m.stop(Redacted, func(other *life) bool { return other == l })
		m.w.DropEvent(ctx, l.event.ID, Redacted)
	case "replace remotely": // the stream reports it later
		if s, ok := l.event.State(); ok {
			m.w.events++
			m.replaced(s, false)
			m.w.roomserver.send(Event{ID: fmt.Sprintf("$remote%d", m.w.events), RoomID: s.RoomID, Type: s.Type, StateKey: &s.Key})
		}
	case "tell":
		if !l.remote.IsZero() {
			if m.w.StateRemoved(ctx, l.event.ID) == nil { // otherwise the stream reports it again
				m.stop("", func(other *life) bool { return other == l })
			}
		}
	}
}

// place returns a new event, without an ID, at the place that the action selects.
func (m *machine) place(a action) Event {
	m.w.events++
	e := Event{
		ID: fmt.Sprintf("$event%d", m.w.events), Type: "m", RoomID: fmt.Sprintf("!room%d", a.which&1),
		Sender: fmt.Sprintf("@user%d:example.org", a.which>>2&1),
	}
	if a.which&2 != 0 {
		key := "key"
		e.StateKey = &key
	}
	return e
}

// send sends an expiring event as the routes and the wrapper do, or crashes on the way.
func (m *machine) send(a action, e Event) {
	ctx := m.w.t.Context()
	s, isState := e.State()
	unlock := func() {}
	if isState {
		var err error
		if unlock, err = m.w.LockState(ctx, s); err != nil {
			m.failed(err)
			return
		}
	}
	l := &life{event: e, hash: m.w.hash(e), duration: a.long, earliest: time.Now().Add(a.long), pending: true}
	m.mu.Lock()
	m.lives = append(m.lives, l)
	m.mu.Unlock()
	p, err := m.w.Begin(ctx, e, a.long, false)
	if err != nil {
		unlock()
		m.failed(err)
		m.never(l)
		return
	}
	if isState {
		m.comes(s)
	}
	switch a.do {
	case "send":
		m.mu.Lock()
		l.pending = false
		m.mu.Unlock()
		m.w.roomserver.send(e)
		p.Activate(true)
		if isState {
			m.w.StateSent(s, "")
			m.replaced(s, true, l)
		}
		unlock()
		return
	case "store":
		// The roomserver finishes the event later, unless a newer one arrives first. Of stored events for the same state, any may win.
		m.mu.Lock()
		l.pending = false
		m.mu.Unlock()
		for _, other := range m.all() {
			if its, ok := other.event.State(); ok && isState && its == s && other != l && m.closingOf(other) == nil {
				m.mu.Lock()
				other.excused, l.excused = true, true
				other.remote = time.Now()
				m.mu.Unlock()
			}
		}
		m.w.roomserver.store(e)
	case "lose":
		m.never(l)
	}
	unlock()
	m.crash(time.Second)
}

// replace sends a state event that does not expire.
func (m *machine) replace(a action) {
	a.which |= 2
	e := m.place(a)
	s, _ := e.State()
	unlock, err := m.w.LockState(m.w.t.Context(), s)
	if err != nil {
		m.failed(err)
		return
	}
	defer unlock()
	m.comes(s)
	m.w.roomserver.send(e)
	m.w.StateSent(s, "")
	m.replaced(s, true)
}

// comes does what the wrapper does before the roomserver gets a state event.
func (m *machine) comes(s StateKey) {
	if err := m.w.StateComes(m.w.t.Context(), s, ""); err != nil {
		m.failed(err)
	}
}

// repeat sends the content of an event again.
func (m *machine) repeat(l *life, d time.Duration) {
	ctx := m.w.t.Context()
	s, ok := l.event.State()
	if !ok {
		return
	}
	unlock, err := m.w.LockState(ctx, s)
	if err != nil {
		m.failed(err)
		return
	}
	defer unlock()
	m.refreshed(l, d, m.w.Restart(ctx, l.event.ID, d))
}

// end ends an event.
func (m *machine) end(l *life, end func() error) {
	before := m.now(l)
	invalid := before.stopped || before.refused
	err := end()
	var dropped *DropError
	switch {
	case err == nil:
		if c := m.closingOf(l); c == nil || c.outcome != Ended || invalid {
			m.problem("%s was ended: its token was invalid %t, closing event %+v", l.event.ID, invalid, c)
		}
		m.mu.Lock()
		l.refused = true
		m.mu.Unlock()
	case errors.Is(err, ErrNotFound), errors.As(err, &dropped):
		m.refuse(l, "end")
	default:
		m.failed(err)
	}
}

// setFaults applies the faults in broken.
func (m *machine) setFaults() {
	written := false
	var h hooks
	failing := map[string]bool{}
	for name, a := range m.broken {
		failing[name] = true
		switch name {
		case "build":
			h.beforeClaim = fails
		case "input":
			h.afterClaim = fails
		case "slow build":
			h.beforeClaim = takes(a.long)
		case "slow input":
			h.afterClaim = takes(a.long)
		case "slow insert":
		default:
			written = written || a.written
		}
	}
	m.w.roomserver.set(h)
	m.w.store.setSlowly(m.broken)
	m.w.store.set(written, func(operation string) error {
		if failing[operation] {
			return errFault
		}
		return nil
	})
}

// crash ends the process at once, and starts the next one.
func (m *machine) crash(down time.Duration) {
	m.w.roomserver.set(hooks{beforeClaim: fails, afterClaim: fails})
	m.w.store.set(false, func(string) error { return errFault })
	m.w.stop()
	m.w.Stop()
	m.ends.Wait()
	// A row that could not be deleted is a running timer again. The attempt at its deadline finds out that it must not be closed.
	m.mu.Lock()
	for _, l := range m.lives {
		if exists, doubted := m.w.store.has(l.event.ID); exists {
			l.stopped, l.refused = l.superseded && doubted, false
		}
	}
	m.mu.Unlock()
	time.Sleep(down)
	m.keptLonger()
	m.w.store.set(false, nil) // a process that cannot load its timers does not start
	m.w.loaded = m.setFaults
	m.w.start(m.w.cfg)
}
