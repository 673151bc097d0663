//go:build all

package integration

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

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
	t.Parallel()
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
