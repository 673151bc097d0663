package dendritefix

import (
	"context"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/setup/jetstream"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"
)

func TestDrain(t *testing.T) {
	var global config.Global
	global.Defaults(config.DefaultOpts{})
	cfg := &global.JetStream
	cfg.Matrix, cfg.NoLog, cfg.StoragePath = &global, true, config.Path(t.TempDir())
	js, stop := startJetStream(t, cfg)
	defer stop()
	output := cfg.Prefixed(jetstream.OutputRoomEvent)
	Drain(t.Context(), js, cfg) // nothing to wait for
	_, err := js.AddConsumer(output, &nats.ConsumerConfig{Durable: "consumer", AckPolicy: nats.AckExplicitPolicy})
	require.NoError(t, err)
	_, err = js.Publish(output, []byte("message"))
	require.NoError(t, err)

	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	Drain(ctx, js, cfg)
	require.Error(t, ctx.Err(), "a message is left")
	fetch(t, js, output, "consumer", 1)
	Drain(t.Context(), js, cfg)
}
