package inputqueue

import (
	"context"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/setup/jetstream"
	"github.com/matrix-org/dendrite/setup/process"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"
)

const testRoom = "!room:example.org"

// newNATS returns the queues of Dendrite's own JetStream, and the worker's subscription to the queue of the test room.
func newNATS(t testing.TB) (*Queues, *nats.Subscription) {
	var cfg config.Dendrite
	cfg.Defaults(config.DefaultOpts{Generate: true, SingleDatabase: true})
	cfg.Global.JetStream.InMemory = true
	cfg.Global.JetStream.StoragePath = config.Path(t.TempDir())
	p := process.NewProcessContext()
	t.Cleanup(func() {
		p.ShutdownDendrite()
		p.WaitForComponentsToFinish()
	})
	instance := jetstream.NATSInstance{}
	js, _ := instance.Prepare(p, &cfg.Global.JetStream)
	q := New(t.Context(), js, &cfg.Global.JetStream, nil, "")
	stream, consumer := cfg.Global.JetStream.Prefixed(jetstream.InputRoomEvent), cfg.Global.JetStream.Prefixed("RoomInput"+jetstream.Tokenise(testRoom))
	subject := cfg.Global.JetStream.Prefixed(jetstream.InputRoomEventSubj(testRoom))
	b, err := q.Backlog(t.Context(), testRoom)
	require.NoError(t, err)
	require.True(t, b.Empty(), "a room that nothing has come for")
	_, err = js.AddConsumer(stream, &nats.ConsumerConfig{
		Durable: consumer, AckPolicy: nats.AckExplicitPolicy, FilterSubject: subject, AckWait: time.Minute,
	})
	require.NoError(t, err)
	worker, err := js.PullSubscribe(subject, consumer, nats.Bind(stream, consumer))
	require.NoError(t, err)
	return q, worker
}

func (q *Queues) publish(t testing.TB) {
	_, err := q.js.Publish(q.cfg.Prefixed(jetstream.InputRoomEventSubj(testRoom)), []byte("{}"))
	require.NoError(t, err)
}

func TestBacklog(t *testing.T) {
	q, worker := newNATS(t)
	is := func(want Backlog) {
		t.Helper()
		b, err := q.Backlog(t.Context(), testRoom)
		require.NoError(t, err)
		require.Equal(t, want, b)
	}
	q.noteInWork(t.Context())
	for range 3 {
		q.publish(t)
	}
	is(Backlog{Waiting: 3})
	msgs, err := worker.Fetch(1)
	require.NoError(t, err)
	is(Backlog{Waiting: 2, InWork: 1, Taken: 1})
	require.NoError(t, msgs[0].AckSync())
	is(Backlog{Waiting: 2, Taken: 1, Done: 1})
	_, err = worker.Fetch(1)
	require.NoError(t, err)

	// A process that starts here does not wait for the messages that were in work.
	q.noteInWork(t.Context())
	is(Backlog{Waiting: 1, Taken: 2, Done: 1})
	_, err = worker.Fetch(1)
	require.NoError(t, err)
	is(Backlog{InWork: 1, Taken: 3, Done: 1})
	q.redeliveredAt = time.Now()
	is(Backlog{InWork: 2, Taken: 3, Done: 1})
}

// BenchmarkBacklog measures a look into a queue. A closing event costs one look if an event has arrived for its room since the last look.
func BenchmarkBacklog(b *testing.B) {
	q, _ := newNATS(b)
	for b.Loop() {
		if _, err := q.Backlog(context.Background(), testRoom); err != nil {
			b.Fatal(err)
		}
	}
}
