//go:build all

package integration

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// Many clients act on the same state keys at once. The answers must be linearizable: some sequential order of all actions must explain
// each answer and its time (docs/protocol.md, sections 1, 2, 4 and 5).

const (
	linearRooms   = 12
	linearKeys    = 2 // in each room
	linearClients = 4 // for each key
	linearActions = 25
	// linearTime limits the whole test. On a slow machine the clients do less in it.
	linearTime = 20 * time.Second
)

// linearPatience limits the search for an order that explains the history of one key.
var linearPatience = patience.For(20 * time.Second)

func TestOneWinner(t *testing.T) {
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		var keys []*contested
		for range linearRooms {
			users := []*user{s.newUser(t), s.newUser(t)}
			roomID := s.room(t, users...)
			for i := range linearKeys {
				keys = append(keys, &contested{s: s, users: users, roomID: roomID, key: fmt.Sprint("key", i)})
			}
		}
		began := time.Now()
		var wg sync.WaitGroup
		for _, k := range keys {
			for client := range linearClients {
				wg.Go(func() {
					for n := 0; n < linearActions && time.Since(began) < linearTime; n++ {
						k.act(t, client)
					}
				})
			}
		}
		wg.Wait()
		for _, k := range keys {
			wg.Go(func() { k.finish(t) })
		}
		wg.Wait()
		if t.Failed() {
			return
		}
		took := time.Since(began)
		timelines := map[string][]gjson.Result{}
		requests, kinds := 0, map[string]int{}
		for i, k := range keys {
			if i%linearKeys == 0 {
				timelines[k.roomID] = k.users[0].timeline(t, k.roomID)
			}
			h := k.history(t, timelines[k.roomID])
			requests += len(k.requests)
			for _, op := range h.operations {
				kinds[op.Input.(step).kind()]++
			}
			if !h.check(t, fmt.Sprintf("%s-%d", strings.ReplaceAll(t.Name(), "/", "-"), i)) {
				break // it takes long to find that there is no order, and one failure is enough
			}
		}
		t.Logf("%d requests on %d keys in %s, checked after %s: %v", requests, len(keys), took, time.Since(began), kinds)
	})
}

// contested is a state key that several clients act on.
type contested struct {
	s      *server
	users  []*user
	roomID string
	key    string

	mu       sync.Mutex
	contents int
	sent     []sentContent
	deadline time.Time // of the event that was sent or refreshed last, as far as clients can know
	requests []request
}

// sentContent is an expiring event, and what is needed to repeat its send.
type sentContent struct {
	sent
	content, user int
	seconds       int
}

// verb is the kind of a request, or of an action of the server's own.
type verb string

const (
	send    verb = "send"
	refresh verb = "refresh"
	end     verb = "end"
	read    verb = "read"
)

// request is a request and its answer.
type request struct {
	client    int
	call, ret int64 // when it was sent and when its answer had arrived, in nanoseconds
	verb      verb
	// event is the ID of the event that was sent or read, "" if there was none. For a keep-alive it is the event of the token.
	event         string
	content, user int // of a send
	seconds       int // 0 for an event that does not expire
	accepted      bool
}

// act makes a random request. Half of the requests are made at about the time when the event expires.
func (k *contested) act(t *testing.T, client int) {
	k.mu.Lock()
	deadline, known := k.deadline, len(k.sent)
	var target sentContent
	if known > 0 {
		target = k.sent[known-1]
		if rand.IntN(4) == 0 {
			target = k.sent[rand.IntN(known)]
		}
	}
	k.contents++
	content := k.contents
	k.mu.Unlock()
	if rand.IntN(2) == 0 {
		time.Sleep(time.Until(deadline.Add(time.Duration(rand.IntN(600)-100) * time.Millisecond)))
	}
	user := rand.IntN(len(k.users))
	choice := rand.IntN(100)
	switch {
	case choice < 8 || known == 0:
		k.send(t, request{client: client, content: content, user: user, seconds: 1 + rand.IntN(2)})
	case choice < 14: // the same content, mostly from the same user
		if rand.IntN(4) > 0 {
			user = target.user
		}
		k.send(t, request{client: client, content: target.content, user: user, seconds: 1 + rand.IntN(2)})
	case choice < 20:
		k.send(t, request{client: client, content: content, user: user})
		if known > 0 { // when the send is answered, the old token must be invalid, even before the stream reports the new event
			k.keepAlive(t, client, refresh, k.newest())
		}
	case choice < 55:
		k.keepAlive(t, client, refresh, target)
	case choice < 62:
		k.keepAlive(t, client, end, target)
	default:
		k.read(t, client)
	}
}

// newest returns the latest expiring event.
func (k *contested) newest() sentContent {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.sent[len(k.sent)-1]
}

// finish waits until the last event expires. After that all tokens must be refused.
func (k *contested) finish(t *testing.T) {
	// The roomserver answers this request. The data behind /sync may be far behind now.
	eventuallyWithin(t, patience.For(time.Minute), "the last event is closed", func() bool {
		return k.users[0].state(t, k.roomID, k.key).Get(`content.m\.will_expire`).Str != "running"
	})
	k.read(t, 0)
	for _, sent := range k.sent {
		k.keepAlive(t, 0, refresh, sent)
	}
}

func (k *contested) send(t *testing.T, r request) {
	body := JSON{"n": r.content}
	if r.seconds > 0 {
		body["m.will_expire"] = r.seconds
	}
	r.verb, r.accepted, r.call = send, true, time.Now().UnixNano()
	res := k.users[r.user].must(t, http.MethodPut, homeserver.StatePath(k.roomID, memberType, k.key), body)
	r.ret = time.Now().UnixNano()
	r.event = res.Get("event_id").Str
	k.mu.Lock()
	defer k.mu.Unlock()
	k.requests = append(k.requests, r)
	if r.seconds > 0 {
		k.sent = append(k.sent, sentContent{sentBy(t, res), r.content, r.user, r.seconds})
		k.deadline = time.Now().Add(time.Duration(r.seconds) * time.Second)
	}
}

func (k *contested) keepAlive(t *testing.T, client int, v verb, target sentContent) {
	r := request{client: client, verb: v, event: target.eventID, call: time.Now().UnixNano()}
	code, errcode := k.s.keepAlive(t, string(v), target.token)
	r.ret = time.Now().UnixNano()
	r.accepted = code == http.StatusOK
	if !r.accepted {
		require.Equal(t, http.StatusNotFound, code, errcode)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.requests = append(k.requests, r)
	if r.accepted && v == refresh {
		k.deadline = time.Now().Add(time.Duration(target.seconds) * time.Second)
	}
}

// read requests the current state. The roomserver answers the request, and not the copy behind /sync.
func (k *contested) read(t *testing.T, client int) {
	r := request{client: client, verb: read, accepted: true, call: time.Now().UnixNano()}
	r.event = k.users[rand.IntN(len(k.users))].state(t, k.roomID, k.key).Get("event_id").Str
	r.ret = time.Now().UnixNano()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.requests = append(k.requests, r)
}

// history is the history of one state key, as the checker needs it.
type history struct {
	events     []stateEvent
	indexes    map[string]int // by event ID
	operations []porcupine.Operation
}

// stateEvent has the certain facts about an event.
type stateEvent struct {
	id            string
	content, user int
	expires       bool
}

// none is the index of no event.
const none = -1

func (h *history) index(eventID string) int {
	if eventID == "" {
		return none
	}
	i, ok := h.indexes[eventID]
	if !ok {
		i = len(h.events)
		h.events, h.indexes[eventID] = append(h.events, stateEvent{id: eventID}), i
	}
	return i
}

// add adds one step, which is atomic for all observers.
func (h *history) add(client int, call, ret int64, s step) {
	h.operations = append(h.operations, porcupine.Operation{ClientId: client, Call: call, Return: ret, Input: s})
}

// history combines the requests with the server's own actions. The events that the server closed because they expired are in the room's
// timeline.
func (k *contested) history(t *testing.T, timeline []gjson.Result) *history {
	h := &history{indexes: map[string]int{}}
	type closing struct {
		index, closes int
		outcome       string
		built         int64
	}
	var closings []closing
	for _, e := range timeline {
		original := e.Get(`content.m\.relates_to.event_id`).Str
		if e.Get("type").Str == memberType && e.Get("state_key").Str == k.key && original != "" {
			closings = append(closings, closing{
				h.index(e.Get("event_id").Str), h.index(original), e.Get(`content.m\.will_expire`).Str,
				time.UnixMilli(e.Get("origin_server_ts").Int()).UnixNano(),
			})
		}
	}
	// A request with two steps needs two rows in the visualization.
	row := func(r request) int { return 2 * r.client }
	last, seen := int64(0), map[int]int64{}
	slices.SortFunc(k.requests, func(a, b request) int { return cmp.Compare(a.ret, b.ret) })
	for _, r := range k.requests {
		last = max(last, r.ret)
		i := h.index(r.event)
		switch r.verb {
		case send:
			h.events[i] = stateEvent{id: r.event, content: r.content, user: r.user, expires: r.seconds > 0}
			put := step{verb: send, event: i, at: r.call, duration: int64(r.seconds) * int64(time.Second)}
			h.add(row(r), r.call, r.ret, put)
			h.add(row(r)+1, r.call, r.ret, step{verb: answered, event: i})
		case read:
			if _, ok := seen[i]; !ok {
				seen[i] = r.ret
			}
			h.add(row(r), r.call, r.ret, step{verb: read, event: i})
		case refresh:
			h.add(row(r), r.call, r.ret, step{verb: refresh, event: i, at: r.call, refused: !r.accepted})
		case end:
			if !r.accepted {
				h.add(row(r), r.call, r.ret, step{verb: end, event: i, refused: true})
				break
			}
			at := slices.IndexFunc(closings, func(c closing) bool { return c.closes == i && c.outcome == "ended" })
			if at < 0 {
				t.Errorf("/end was accepted for %s, which has no other closing event with \"ended\"", r.event)
				break
			}
			h.add(row(r), r.call, r.ret, step{verb: claim, event: i, at: never})
			h.add(row(r)+1, r.call, r.ret, step{verb: show, event: closings[at].index, closes: i})
			closings = slices.Delete(closings, at, at+1)
		}
	}
	for _, c := range closings {
		if c.outcome != "expired" {
			t.Errorf("nobody ended %s", h.events[c.closes].id)
		}
		ret, ok := seen[c.index]
		if !ok {
			ret = last
		}
		// The event's time is the time when it was built, or its deadline. The claim happened after that.
		h.add(2*linearClients, c.built-tick, ret, step{verb: claim, event: c.closes, at: c.built})
		h.add(2*linearClients+1, c.built-tick, ret, step{verb: show, event: c.index, closes: c.closes})
	}
	return h
}

// These are the steps of the model that are not requests.
const (
	// answered: the send of an event is about to be answered. From now on the tokens of replaced events are invalid.
	answered verb = "answered"
	// claim: the server decides to close an event. The event's token is now invalid.
	claim verb = "claim"
	// show: the closing event becomes the current state.
	show verb = "show"
)

const (
	// tick is the resolution of origin_server_ts.
	tick = int64(time.Millisecond)
	// never is the time at which an ended event would expire.
	never = int64(1) << 62
)

// step is an atomic action.
type step struct {
	verb  verb
	event int // the event that is sent, read or shown, or whose token is used
	// at depends on the verb. For send and refresh it is the earliest time from which the duration counts. For claim it is the time of the
	// closing event.
	at       int64
	duration int64 // of send; 0 if the event does not expire
	closes   int   // of show: the original
	refused  bool  // of refresh and end: the token was refused
}

// kind describes the step without the event.
func (s step) kind() string {
	switch {
	case s.refused:
		return string(s.verb) + " refused"
	case s.verb == send && s.duration > 0:
		return "send expiring"
	case s.verb == claim && s.at == never:
		return "claim ended"
	case s.verb == claim:
		return "claim expired"
	}
	return string(s.verb)
}

func (s step) String() string {
	text := fmt.Sprintf("%s e%d", s.kind(), s.event)
	switch {
	case s.verb == show:
		text += fmt.Sprintf(", closing e%d", s.closes)
	case s.verb == send && s.duration > 0:
		text += fmt.Sprintf(", for %s", time.Duration(s.duration))
	}
	return text
}

// These are the phases of an event's life in the model.
const (
	unseen  = '-' // not sent yet
	running = 'r' // its token is valid, also for a moment after another event has become the current state
	claimed = 'c' // it will be closed; its token is invalid
	over    = '.' // it has no valid token, and never will
)

// keyState is the state of one state key in the model. It is comparable.
type keyState struct {
	current int
	lives   string // one character for each event
	// since and duration belong to the current event, if it is running. It must not expire before since+duration.
	since, duration int64
}

func (s keyState) life(event int) byte { return s.lives[event] }

func (s keyState) with(event int, life byte) keyState {
	lives := []byte(s.lives)
	lives[event] = life
	s.lives = string(lives)
	return s
}

// model is the specification of one state key.
func (h *history) model() porcupine.Model {
	return porcupine.Model{
		Init: func() any {
			return keyState{current: none, lives: strings.Repeat(string(unseen), len(h.events))}
		},
		Step: func(state, input, _ any) (bool, any) {
			next, ok := h.step(state.(keyState), input.(step))
			return ok, next
		},
		DescribeOperation: func(input, _ any) string { return input.(step).String() },
		DescribeState: func(state any) string {
			s := state.(keyState)
			text := fmt.Sprintf("current e%d, %s", s.current, s.lives)
			if s.current != none && s.life(s.current) == running {
				text += ", until " + time.Unix(0, s.since+s.duration).UTC().Format(time.StampMicro)
			}
			return text
		},
	}
}

// step returns the state after a step, and false if the step is not allowed.
func (h *history) step(s keyState, do step) (keyState, bool) {
	switch do.verb {
	case send:
		return h.send(s, do)
	case answered: // from now on replaced events have no valid tokens
		if s.life(do.event) == unseen {
			return s, false
		}
		for i := range h.events {
			if s.life(i) == running && i != s.current {
				s = s.with(i, over)
			}
		}
		return s, true
	case read:
		return s, s.current == do.event
	case refresh:
		if do.refused {
			return refuse(s, do.event)
		}
		if do.event == s.current { // of several concurrent refreshes, the last one counts
			s.since = max(s.since, do.at)
		}
		return s, s.life(do.event) == running
	case end: // an accepted end is a claim and a show
		return refuse(s, do.event)
	case claim:
		early := do.at+tick < s.since+s.duration
		return s.with(do.event, claimed), s.life(do.event) == running && s.current == do.event && !early
	case show:
		ok := s.life(do.closes) == claimed && s.current == do.closes && s.life(do.event) == unseen
		s.current = do.event
		return s.with(do.closes, over).with(do.event, over), ok
	}
	return s, false
}

// send handles a new event. A send with content and sender of the current event, while that is running, only restarts its timer.
func (h *history) send(s keyState, do step) (keyState, bool) {
	e := h.events[do.event]
	if s.current != none && s.life(s.current) == running && e.expires {
		current := h.events[s.current]
		if current.content == e.content && current.user == e.user {
			s.since, s.duration = max(s.since, do.at), do.duration
			return s, s.current == do.event
		}
	}
	ok := s.life(do.event) == unseen
	s.current = do.event
	if !e.expires {
		return s.with(do.event, over), ok
	}
	s.since, s.duration = do.at, do.duration
	return s.with(do.event, running), ok
}

// refuse handles the refusal of a token. A refusal is final, also for a token that was about to become invalid.
func refuse(s keyState, event int) (keyState, bool) {
	if s.life(event) != running {
		return s, true
	}
	return s.with(event, over), s.current != event
}

// check searches for an order that explains the history, and reports whether there is one. If there is none, it prints the history. It
// also draws the history, if the environment variable KEEP_LOGS names a folder.
func (h *history) check(t *testing.T, name string) bool {
	t.Helper()
	result, info := porcupine.CheckOperationsVerbose(h.model(), h.operations, linearPatience)
	if result == porcupine.Ok {
		return true
	}
	var text strings.Builder
	first := slices.MinFunc(h.operations, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) }).Call
	slices.SortFunc(h.operations, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
	for _, op := range h.operations {
		fmt.Fprintf(&text, "%12s to %12s, client %d: %s\n", time.Duration(op.Call-first), time.Duration(op.Return-first), op.ClientId/2, op.Input)
	}
	for i, e := range h.events {
		fmt.Fprintf(&text, "e%d is %s\n", i, e.id)
	}
	t.Errorf("no order explains this history (%s):\n%s", result, &text)
	if dir := os.Getenv("KEEP_LOGS"); dir != "" {
		if err := porcupine.VisualizePath(h.model(), info, filepath.Join(dir, name+".html")); err != nil {
			t.Error(err)
		}
	}
	return false
}
