package roomserver

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

// newNATS returns the queues of Dendrite's own JetStream, with one for the test's room.
func newNATS(t testing.TB) (*natsQueues, *nats.Subscription) {
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
	q := &natsQueues{js: js, cfg: &cfg.Global.JetStream, reader: "Reader"}
	stream, consumer := cfg.Global.JetStream.Prefixed(jetstream.InputRoomEvent), cfg.Global.JetStream.Prefixed("RoomInput"+jetstream.Tokenise(testRoom))
	subject := cfg.Global.JetStream.Prefixed(jetstream.InputRoomEventSubj(testRoom))
	b, err := q.backlog(t.Context(), testRoom)
	require.NoError(t, err)
	require.True(t, b.empty(), "a room that nothing has come for")
	_, err = js.AddConsumer(stream, &nats.ConsumerConfig{
		Durable: consumer, AckPolicy: nats.AckExplicitPolicy, FilterSubject: subject, AckWait: time.Minute,
	})
	require.NoError(t, err)
	worker, err := js.PullSubscribe(subject, consumer, nats.Bind(stream, consumer))
	require.NoError(t, err)
	return q, worker
}

func (n *natsQueues) publish(t testing.TB) {
	_, err := n.js.Publish(n.cfg.Prefixed(jetstream.InputRoomEventSubj(testRoom)), []byte("{}"))
	require.NoError(t, err)
}

func TestBacklog(t *testing.T) {
	q, worker := newNATS(t)
	is := func(want backlog) {
		t.Helper()
		b, err := q.backlog(t.Context(), testRoom)
		require.NoError(t, err)
		require.Equal(t, want, b)
	}
	q.noteLeft(t.Context())
	for range 3 {
		q.publish(t)
	}
	is(backlog{waiting: 3})
	msgs, err := worker.Fetch(1)
	require.NoError(t, err)
	is(backlog{waiting: 2, inWork: 1, taken: 1})
	require.NoError(t, msgs[0].AckSync())
	is(backlog{waiting: 2, taken: 1, done: 1})
	_, err = worker.Fetch(1)
	require.NoError(t, err)

	// A process that begins here waits for nobody to deal with what was in work.
	q.noteLeft(t.Context())
	is(backlog{waiting: 1, taken: 2, done: 1})
	_, err = worker.Fetch(1)
	require.NoError(t, err)
	is(backlog{inWork: 1, taken: 3, done: 1})
	q.again = time.Now()
	is(backlog{inWork: 2, taken: 3, done: 1})
}

func TestOutputIsRead(t *testing.T) {
	q, _ := newNATS(t)
	read := func() uint64 {
		t.Helper()
		n, err := q.read(t.Context())
		require.NoError(t, err)
		return n
	}
	stream := q.cfg.Prefixed(jetstream.OutputRoomEvent)
	require.Equal(t, ^uint64(0), read(), "there is no consumer yet")
	reader, err := q.js.PullSubscribe(stream, q.reader, nats.DeliverAll(), nats.ManualAck())
	require.NoError(t, err)
	for range 2 {
		_, err = q.js.Publish(stream, []byte("{}"))
		require.NoError(t, err)
	}
	written, err := q.written(t.Context())
	require.NoError(t, err)
	require.Equal(t, uint64(2), written)
	require.Less(t, read(), written)
	msgs, err := reader.Fetch(2)
	require.NoError(t, err)
	require.NoError(t, msgs[0].AckSync())
	require.Less(t, read(), written)
	require.NoError(t, msgs[1].AckSync())
	require.GreaterOrEqual(t, read(), written)
}

// BenchmarkBacklog is what a closing costs in a room for which something has come, once for each time that something comes.
func BenchmarkBacklog(b *testing.B) {
	q, _ := newNATS(b)
	for b.Loop() {
		if _, err := q.backlog(context.Background(), testRoom); err != nil {
			b.Fatal(err)
		}
	}
}
