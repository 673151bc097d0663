package dendritefix

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/setup/jetstream"
	"github.com/matrix-org/dendrite/setup/process"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"
)

func TestStrandedConsumers(t *testing.T) {
	var global config.Global
	global.Defaults(config.DefaultOpts{})
	cfg := &global.JetStream
	cfg.Matrix, cfg.NoLog, cfg.StoragePath = &global, true, config.Path(t.TempDir())
	input, output := cfg.Prefixed(jetstream.InputRoomEvent), cfg.Prefixed(jetstream.OutputRoomEvent)

	js, stop := startJetStream(t, cfg)
	consumers := []*nats.ConsumerConfig{
		{Durable: "quiet", FilterSubject: input + ".quiet", AckPolicy: nats.AckExplicitPolicy},
		{Durable: "stranded", FilterSubject: input + ".stranded", AckPolicy: nats.AckExplicitPolicy},
		{Name: "ephemeral", InactiveThreshold: time.Hour, AckPolicy: nats.AckExplicitPolicy},
	}
	for _, consumer := range consumers {
		_, err := js.AddConsumer(input, consumer)
		require.NoError(t, err)
	}
	_, err := js.AddConsumer(output, &nats.ConsumerConfig{Durable: "waiting", AckPolicy: nats.AckExplicitPolicy})
	require.NoError(t, err)
	for _, subject := range []string{input + ".stranded", input + ".stranded", output} {
		_, err = js.Publish(subject, []byte("before"))
		require.NoError(t, err)
	}
	for _, name := range []string{"stranded", "ephemeral"} {
		require.Equal(t, []string{"before", "before"}, fetch(t, js, input, name, 2))
	}
	stop()

	// The files are now as after a crash at the moment when JetStream notes that the stream is empty.
	require.NoError(t, os.RemoveAll(filepath.Join(string(cfg.StoragePath), "jetstream", "$G", "streams", input, "msgs")))
	js, stop = startJetStream(t, cfg)
	defer stop()
	stream, err := js.StreamInfo(input)
	require.NoError(t, err)
	require.Zero(t, stream.State.LastSeq, "JetStream forgot nothing")
	before, err := js.ConsumerInfo(input, "quiet")
	require.NoError(t, err)

	require.NoError(t, ResetStrandedConsumers(t.Context(), js, cfg))
	_, err = js.ConsumerInfo(input, "ephemeral")
	require.ErrorIs(t, err, nats.ErrConsumerNotFound)
	after, err := js.ConsumerInfo(input, "quiet")
	require.NoError(t, err)
	require.Equal(t, before.Created, after.Created, "made anew without need")
	_, err = js.Publish(input+".stranded", []byte("after"))
	require.NoError(t, err)
	require.Equal(t, []string{"after"}, fetch(t, js, input, "stranded", 1))
	require.Equal(t, []string{"before"}, fetch(t, js, output, "waiting", 1), "of another stream")
}

// startJetStream starts Dendrite's embedded JetStream with its streams.
func startJetStream(t *testing.T, cfg *config.JetStream) (nats.JetStreamContext, func()) {
	t.Helper()
	ctx := process.NewProcessContext()
	js, _ := new(jetstream.NATSInstance).Prepare(ctx, cfg)
	return js, func() {
		ctx.ShutdownDendrite()
		ctx.WaitForComponentsToFinish()
	}
}

// fetch reads and acknowledges n messages.
func fetch(t *testing.T, js nats.JetStreamContext, stream, consumer string, n int) (contents []string) {
	t.Helper()
	info, err := js.ConsumerInfo(stream, consumer)
	require.NoError(t, err)
	sub, err := js.PullSubscribe(info.Config.FilterSubject, "", nats.Bind(stream, consumer))
	require.NoError(t, err)
	for len(contents) < n {
		msgs, err := sub.Fetch(n-len(contents), nats.MaxWait(10*time.Second))
		require.NoError(t, err, "%d messages of %d came to %s", len(contents), n, consumer)
		for _, msg := range msgs {
			require.NoError(t, msg.AckSync())
			contents = append(contents, string(msg.Data))
		}
	}
	return contents
}
