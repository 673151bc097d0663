package roomserver

import (
	"testing"

	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/setup/jetstream"
	"github.com/matrix-org/dendrite/setup/process"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"
)

func TestOutputIsHeard(t *testing.T) {
	var cfg config.Dendrite
	cfg.Defaults(config.DefaultOpts{Generate: true, SingleDatabase: true})
	cfg.Global.JetStream.InMemory = true
	cfg.Global.JetStream.StoragePath = config.Path(t.TempDir())
	p := process.NewProcessContext()
	t.Cleanup(func() {
		p.ShutdownDendrite()
		p.WaitForComponentsToFinish()
	})
	js, _ := new(jetstream.NATSInstance).Prepare(p, &cfg.Global.JetStream)
	o := NewOutput(js, &cfg.Global.JetStream, "Reader")
	heard := func() uint64 {
		t.Helper()
		n, err := o.heard(t.Context())
		require.NoError(t, err)
		return n
	}
	stream := o.cfg.Prefixed(jetstream.OutputRoomEvent)
	require.Equal(t, ^uint64(0), heard(), "there is no consumer yet")
	reader, err := js.PullSubscribe(stream, "Reader", nats.DeliverAll(), nats.ManualAck())
	require.NoError(t, err)
	for range 2 {
		_, err = js.Publish(stream, []byte("{}"))
		require.NoError(t, err)
	}
	written, err := o.written(t.Context())
	require.NoError(t, err)
	require.Equal(t, uint64(2), written)
	require.Less(t, heard(), written)
	msgs, err := reader.Fetch(2)
	require.NoError(t, err)
	require.NoError(t, msgs[0].AckSync())
	require.Less(t, heard(), written)
	require.NoError(t, msgs[1].AckSync())
	require.GreaterOrEqual(t, heard(), written)
}
