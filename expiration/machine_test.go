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

// modes are ways to play a script. In a calm one nothing fails, and nothing takes time. In a slow one insertions take time.
var modes = []struct {
	name       string
	calm, slow bool
}{{"Calm", true, false}, {"Slow", true, true}, {"WithFaults", false, false}}

// slowInsert draws how slow insertions are.
func slowInsert(t *rapid.T) action {
	return action{
		do: "slow insert", long: time.Duration(rapid.IntRange(1, 5000).Draw(t, "insertion")) * time.Millisecond,
		written: rapid.Bool().Draw(t, "written"),
	}
}

// action is one line of a script.
type action struct {
	do string
	// which selects the event that the action concerns, or the place of a new one.
	which int
	// long is a duration, for example of a pause or a fault.
	long time.Duration
	// fault is the operation that fails, for "faults". written says that the store has done the operation before it fails or takes long.
	fault   string
	written bool
}

func (a action) String() string {
	text := fmt.Sprintf("%s %d %s", a.do, a.which, a.long)
	if a.fault != "" {
		text += fmt.Sprintf(" %s %t", a.fault, a.written)
	}
	return text
}

// faults are what can fail: operations of the store, and steps of the roomserver.
var faults = []string{"insert", "refresh", "claim", "read", "drop", "delete", "doubt", "build", "input", "slow build", "slow input"}

// actions draws the actions of a script.
func actions(calm bool) *rapid.Generator[action] {
	todo := []string{
		"send", "send", "refresh", "refresh", "sleep", "sleep", "end", "repeat", "replace", "replace remotely", "tell", "redact", "leave",
		"purge", "change",
	}
	if !calm {
		todo = append(todo, "faults", "faults", "slow insert", "slow insert", "slow insert", "heal", "crash", "lose", "store",
			"overtake", "overtake")
	}
	return rapid.Custom(func(t *rapid.T) action {
		a := action{
			do:    rapid.SampledFrom(todo).Draw(t, "do"),
			which: rapid.IntRange(0, 7).Draw(t, "which"),
			long:  time.Duration(rapid.IntRange(1, 12_000).Draw(t, "ms"))*time.Millisecond + 137*time.Microsecond,
		}
		if a.do == "faults" {
			a.fault = rapid.SampledFrom(faults).Draw(t, "fault")
		}
		if a.do == "faults" || a.do == "slow insert" {
			a.written = rapid.Bool().Draw(t, "written")
		}
		return a
	})
}

// life is what the model knows of an expiring event.
type life struct {
	event Event
	hash  TokenHash
	// duration and earliest are those of the last successful refresh. After a refresh that may have been written, each is the smaller of
	// both values.
	duration time.Duration
	earliest time.Time
	// excused: there need not be a closing event. stopped: the token must be invalid too. superseded: it is stopped because of newer state
	// that was sent here.
	excused, stopped, superseded bool
	// refused: the token was refused as unknown once.
	refused bool
	// pending: the event is not sent yet, and the client does not know the token.
	pending bool
	// remote is when an event of another server replaced this one, or zero.
	remote time.Time
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

// all returns all events so far.
func (m *machine) all() []*life {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.lives)
}

// now returns a copy of what is known of an event.
func (m *machine) now(l *life) life {
	m.mu.Lock()
	defer m.mu.Unlock()
	return *l
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
		m.ends.Go(func() { m.end(l) })
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
			_ = m.w.StateSent(ctx, s, "")
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

// never notes that an event was not sent.
func (m *machine) never(l *life) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.orphans = true
	m.lives = slices.DeleteFunc(m.lives, func(other *life) bool { return other == l })
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
	m.w.StateSent(m.w.t.Context(), s, "")
	m.replaced(s, true)
}

// comes does what the wrapper does before the roomserver gets a state event.
func (m *machine) comes(s StateKey) {
	if err := m.w.StateComes(m.w.t.Context(), s, ""); err != nil {
		m.failed(err)
	}
}

// replaced notes that the events of a piece of state, except for keep, are no longer current.
func (m *machine) replaced(s StateKey, here bool, keep ...*life) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.lives {
		if its, ok := l.event.State(); !ok || its != s || l.pending || slices.Contains(keep, l) {
			continue // a pending event will be newer
		}
		l.excused = true
		if l.remote.IsZero() && !here {
			l.remote = time.Now()
		}
		if here {
			l.stopped, l.superseded = true, true
		}
	}
}

// stop notes that some events need no closing event from now on. If there is a reason, the roomserver refuses their closing events.
func (m *machine) stop(reason DropReason, which func(*life) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.lives {
		if !which(l) {
			continue
		}
		l.excused, l.stopped = true, true
		if reason != "" {
			m.w.roomserver.refuse(l.event.ID, reason)
		}
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

// refreshed notes the answer of a refresh or restart.
func (m *machine) refreshed(l *life, d time.Duration, err error) {
	due := time.Now().Add(d)
	switch {
	case err == nil:
		if l := m.now(l); l.stopped || l.refused {
			m.problem("%s was refreshed: stopped %t, refused before %t", l.event.ID, l.stopped, l.refused)
		}
		if c := m.closingOf(l); c != nil {
			m.problem("%s was refreshed and has been closed by %s", l.event.ID, c.eventID)
		}
		l.duration, l.earliest = d, due
	case errors.Is(err, ErrNotFound):
		m.refuse(l, "refresh")
	default: // the refresh may have been written
		m.failed(err)
		l.duration = min(d, l.duration)
		if due.Before(l.earliest) {
			l.earliest = due
		}
	}
}

// end ends an event.
func (m *machine) end(l *life) {
	before := m.now(l)
	invalid := before.stopped || before.refused
	err := m.w.End(m.w.t.Context(), l.hash)
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

// refuse notes that a token was refused as unknown.
func (m *machine) refuse(l *life, method string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l.refused = true
	if m.calm && !l.excused && m.closingOf(l) == nil {
		m.problems = append(m.problems, fmt.Sprintf("%s of %s was refused, and it runs", method, l.event.ID))
	}
}

// failed notes an error, which is a problem unless the script has caused a fault.
func (m *machine) failed(err error) {
	if m.calm || !errors.Is(err, errFault) {
		m.problem("failed: %s", err)
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
	m.w.store.set(false, nil) // a process that cannot load its timers does not start
	m.w.loaded = m.setFaults
	m.w.start(m.w.cfg)
}

// closingOf returns the closing event of an event, or nil.
func (m *machine) closingOf(l *life) *closing {
	for _, c := range m.w.roomserver.closings() {
		if c.closes == l.event.ID {
			return &c
		}
	}
	return nil
}

// checkClosings checks what must hold at every moment.
func (m *machine) checkClosings() {
	seen := map[string]string{}
	for _, c := range m.w.roomserver.closings() {
		if other, ok := seen[c.closes]; ok {
			m.problem("%s was closed by %s and by %s", c.closes, other, c.eventID)
		}
		seen[c.closes] = c.eventID
		lives := m.all()
		i := slices.IndexFunc(lives, func(l *life) bool { return l.event.ID == c.closes })
		if i < 0 {
			m.problem("%s closes %s, which was never sent", c.eventID, c.closes)
			continue
		}
		l := m.now(lives[i])
		if c.outcome == Expired && (c.sent.Before(l.earliest) || m.calm && !c.at.Equal(l.earliest)) {
			m.problem("%s expired at %s, bears %s, its deadline was %s", c.closes, c.at, c.sent, l.earliest)
		}
		if _, isState := l.event.State(); isState && c.over != c.closes && (l.remote.IsZero() || l.remote.Before(c.built)) {
			m.problem("%s, which closes %s, replaced %s", c.eventID, c.closes, c.over)
		}
	}
}

// finish removes all faults, waits until no work is left, and checks the result.
func (m *machine) finish() {
	clear(m.broken)
	m.setFaults()
	time.Sleep(5 * time.Minute)
	m.ends.Wait()
	m.checkOver()
	if !m.calm {
		// The next start finds claims whose write seemed to fail, and rows of events that were never sent.
		m.crash(time.Second)
		time.Sleep(5 * time.Minute)
		if m.orphans {
			time.Sleep(givenUpAfter * lastPause)
		}
		m.checkOver()
	}
	if n := m.w.store.len(); n > 0 {
		m.problem("%d rows are left", n)
	}
	if !m.w.index.Empty() {
		m.problem("the index is not empty")
	}
}

// checkOver checks that every event is closed or excused.
func (m *machine) checkOver() {
	synctest.Wait()
	m.checkClosings()
	for _, l := range m.all() {
		if m.closingOf(l) == nil && !m.now(l).excused {
			m.problem("%s was never closed", l.event.ID)
		}
		if m.w.known(l.hash) {
			m.problem("the token of %s is still known", l.event.ID)
		}
	}
}

// checkIndex checks the invariants of the index.
func (m *machine) checkIndex() {
	if err := m.w.invariants(); err != nil {
		m.problem("the index: %s", err)
	}
}
