//go:build all

package clients

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// bot is a user of mautrix-go in a room. It sends events of one type.
type bot struct {
	*mautrix.Client
	sent      *recorder
	roomID    id.RoomID
	eventType event.Type
	// stateKey is the state key of the bot's events; nil means that they are messages.
	stateKey *string
	received <-chan *event.Event
}

// recorder makes requests, and remembers the last one about delayed events.
type recorder struct{ last string }

func (r *recorder) RoundTrip(req *http.Request) (*http.Response, error) {
	if delayed := strings.Contains(req.URL.String(), "msc4140"); delayed && req.Body != nil {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			return nil, err
		}
		req.Body = io.NopCloser(bytes.NewReader(body))
		authorized := req.Header.Get("Authorization") != ""
		r.last = fmt.Sprintf("%s %s %s, token: %t", req.Method, req.URL.RequestURI(), body, authorized)
	}
	return http.DefaultTransport.RoundTrip(req)
}

type content struct {
	Text string `json:"text"`
}

// newBot makes a user and a room, and starts to sync.
func newBot(t *testing.T, server *homeserver.Server, name string, stateKey *string) *bot {
	t.Helper()
	user, err := server.Register(t.Context(), name)
	require.NoError(t, err)
	roomID, err := user.CreateRoom(t.Context(), nil)
	require.NoError(t, err)
	client, err := mautrix.NewClient(server.URL, id.UserID(user.UserID), user.Token)
	require.NoError(t, err)
	b := &bot{Client: client, sent: &recorder{}, roomID: id.RoomID(roomID), stateKey: stateKey}
	client.Client = &http.Client{Transport: b.sent}
	b.eventType = event.Type{Type: "org.example.delayed", Class: event.MessageEventType}
	if stateKey != nil {
		b.eventType.Class = event.StateEventType
	}
	received := make(chan *event.Event, 100)
	b.received = received
	client.Syncer.(*mautrix.DefaultSyncer).OnEventType(b.eventType, func(_ context.Context, e *event.Event) { received <- e })
	synced := make(chan error, 1)
	go func() { synced <- client.SyncWithContext(t.Context()) }()
	t.Cleanup(func() { require.ErrorIs(t, <-synced, context.Canceled) })
	return b
}

// schedule schedules an event and returns its delay ID.
func (b *bot) schedule(t *testing.T, delay time.Duration, text string) id.DelayID {
	t.Helper()
	var res *mautrix.RespSendEvent
	var err error
	if later := (mautrix.ReqSendEvent{UnstableDelay: delay}); b.stateKey == nil {
		res, err = b.SendMessageEvent(t.Context(), b.roomID, b.eventType, content{text}, later)
	} else {
		res, err = b.SendStateEvent(t.Context(), b.roomID, b.eventType, *b.stateKey, content{text}, later)
	}
	require.NoError(t, err)
	require.Contains(t, b.sent.last, fmt.Sprintf("?org.matrix.msc4140.delay=%d ", delay.Milliseconds()))
	require.Empty(t, res.EventID, "sent at once")
	require.NotEmpty(t, res.UnstableDelayID)
	return res.UnstableDelayID
}

// scheduled returns the bot's scheduled events.
func (b *bot) scheduled(t *testing.T) []*event.ScheduledDelayedEvent {
	t.Helper()
	res, err := b.DelayedEvents(t.Context(), &mautrix.ReqDelayedEvents{})
	require.NoError(t, err)
	require.Equal(t, "GET "+unstableEvents+" {}, token: true", b.sent.last)
	return res.Scheduled
}

func (b *bot) update(t *testing.T, delayID id.DelayID, action event.DelayAction) error {
	t.Helper()
	_, err := b.UpdateDelayedEvent(t.Context(), &mautrix.ReqUpdateDelayedEvent{DelayID: delayID, Action: action})
	require.Equal(t, fmt.Sprintf(`POST %s/%s {"action":%q}, token: true`, unstableEvents, delayID, action), b.sent.last)
	return err
}

// receives waits for the next event, and requires that it is the given one.
func (b *bot) receives(t *testing.T, text string) {
	t.Helper()
	select {
	case e := <-b.received:
		require.Equal(t, text, e.Content.Raw["text"])
		require.Equal(t, b.stateKey, e.StateKey)
		require.Equal(t, b.UserID, e.Sender)
	case <-time.After(soon):
		t.Fatalf("%q did not come", text)
	}
}

func TestMautrix(t *testing.T) {
	server := start(t, homeserver.Config{})
	stateKey := "key"
	for name, stateKey := range map[string]*string{"message": nil, "state": &stateKey} {
		t.Run(name, func(t *testing.T) { testMautrix(t, newBot(t, server, name, stateKey)) })
	}
}

func testMautrix(t *testing.T, b *bot) {
	before := time.Now().Truncate(time.Millisecond)
	first := b.schedule(t, time.Hour, "first")
	second := b.schedule(t, 2*time.Hour, "second")

	list := b.scheduled(t)
	require.Len(t, list, 2, "the order is that of the due times")
	require.Equal(t, second, list[1].DelayID)
	found := list[0]
	require.Equal(t, first, found.DelayID)
	require.Equal(t, b.roomID, found.RoomID)
	require.Equal(t, b.eventType.Type, found.Type.Type)
	require.Equal(t, b.stateKey, found.StateKey)
	require.Equal(t, "first", found.Content.Raw["text"])
	require.Equal(t, time.Hour.Milliseconds(), found.Delay)
	require.WithinRange(t, found.RunningSince.Time, before, time.Now())

	restarted := time.Now().Truncate(time.Millisecond)
	require.NoError(t, b.update(t, first, event.DelayActionRestart))
	require.WithinRange(t, b.scheduled(t)[0].RunningSince.Time, restarted, time.Now())

	require.NoError(t, b.update(t, first, event.DelayActionSend))
	b.receives(t, "first")
	require.ErrorIs(t, b.update(t, first, event.DelayActionRestart), mautrix.MNotFound)

	require.NoError(t, b.update(t, second, event.DelayActionCancel))
	require.ErrorIs(t, b.update(t, second, event.DelayActionSend), mautrix.MNotFound)
	require.Empty(t, b.scheduled(t))

	// The fourth event is due after the third. Its arrival shows that the third was not sent.
	third := b.schedule(t, 2*time.Second, "third")
	b.schedule(t, 2*time.Second, "fourth")
	require.NoError(t, b.update(t, third, event.DelayActionCancel))
	b.receives(t, "fourth")
}
