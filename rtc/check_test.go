package rtc

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// fakeLiveKit answers a check with what a test has set.
type fakeLiveKit struct {
	hangs bool

	mu    sync.Mutex // guards what follows: fake time alone does not order a look after what the test does before it sleeps
	skew  time.Duration
	err   error
	looks int
}

func (f *fakeLiveKit) Check(ctx context.Context) (time.Duration, error) {
	f.mu.Lock()
	f.looks++
	skew, err := f.skew, f.err
	f.mu.Unlock()
	switch {
	case f.hangs:
		<-ctx.Done()
		return 0, fmt.Errorf("calling: %w", ctx.Err())
	case err != nil && err.Error() == "panic":
		panic("on purpose")
	}
	return skew, err
}

// answers sets what later looks are answered.
func (f *fakeLiveKit) answers(err error, skew time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err, f.skew = err, skew
}

// checking starts a check under fake time. logged returns the lines that were logged since the last call.
func checking(t *testing.T, f *fakeLiveKit, insecure ...string) (c *Check, logged func() []string) {
	old := logrus.StandardLogger().ReplaceHooks(logrus.LevelHooks{})
	t.Cleanup(func() { logrus.StandardLogger().ReplaceHooks(old) })
	hook := logtest.NewGlobal()
	c = NewCheck(CheckConfig{APIURL: "http://a.example:7880", Insecure: insecure}, f)
	c.Start(t.Context())
	t.Cleanup(c.Stop)
	return c, func() (lines []string) {
		for _, e := range hook.AllEntries() {
			lines = append(lines, e.Level.String()+": "+e.Message)
		}
		hook.Reset()
		return lines
	}
}

// Each trouble is one line in the log, and in the health check as long as it lasts.
func TestTroubles(t *testing.T) {
	const (
		unreachable = "calls: LiveKit cannot be reached"
		refused     = "calls: LiveKit refuses the key or the secret"
		clock       = "calls: LiveKit's clock is not the same as this server's"
		insecure    = "calls: clients cannot reach ws://a.example from a secure page"
	)
	for name, test := range map[string]struct {
		liveKit  *fakeLiveKit
		insecure []string
		degraded []string
		says     []string
	}{
		"Fine":        {liveKit: &fakeLiveKit{}},
		"SmallSkew":   {liveKit: &fakeLiveKit{skew: -10 * time.Second}},
		"Unreachable": {&fakeLiveKit{err: errors.New("dial: no route")}, nil, []string{unreachable}, []string{"http://a.example:7880 (matrix_rtc.livekit.api_url): dial: no route."}},
		"Hangs":       {&fakeLiveKit{hangs: true}, nil, []string{unreachable}, []string{"deadline exceeded"}},
		"Refused":     {&fakeLiveKit{err: fmt.Errorf("calling: %w", livekit.ErrRefused)}, nil, []string{refused}, []string{"must have a key of livekit.yaml"}},
		"Ahead":       {&fakeLiveKit{skew: 11 * time.Second}, nil, []string{clock}, []string{"clock is 11s ahead of ours"}},
		"Behind":      {&fakeLiveKit{skew: -2 * time.Minute}, nil, []string{clock}, []string{"clock is 2m0s behind ours"}},
		"RefusedBySkew": {&fakeLiveKit{skew: time.Hour, err: livekit.ErrRefused}, nil, []string{refused, clock},
			[]string{"LiveKit refuses our token", "clock is 1h0m0s ahead of ours"}},
		"Insecure": {&fakeLiveKit{}, []string{"ws://a.example"}, []string{insecure}, []string{"do not call ws://a.example"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, logged := checking(t, test.liveKit, test.insecure...)
				time.Sleep(checkTimeout)
				synctest.Wait()
				require.Equal(t, test.degraded, c.Degraded())
				lines := logged()
				require.Len(t, lines, len(test.says))
				for i, says := range test.says {
					require.Contains(t, lines[i], "warning: ")
					require.Contains(t, lines[i], says)
				}
				time.Sleep(10 * checkInterval)
				require.Empty(t, logged(), "a trouble is logged once")
				require.Equal(t, test.degraded, c.Degraded())
			})
		})
	}
}

// A trouble that begins later is noticed within a minute, and so is its end. A panic does not end the looks.
func TestTroublesComeAndGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeLiveKit{}
		c, logged := checking(t, f)
		after := func(err error, skew time.Duration) []string {
			synctest.Wait()
			f.answers(err, skew)
			time.Sleep(checkInterval)
			synctest.Wait()
			return logged()
		}
		require.Len(t, after(errors.New("away"), 0), 1)
		require.Empty(t, after(errors.New("still away"), 0), "the same trouble with another text")
		require.Equal(t, []string{"calls: LiveKit cannot be reached"}, c.Degraded())
		require.Len(t, after(livekit.ErrRefused, time.Minute), 3, "one trouble is over, and two are new")
		require.Len(t, c.Degraded(), 2)
		require.Empty(t, after(livekit.ErrRefused, 2*time.Minute))
		require.Contains(t, after(nil, 0), "info: No longer: calls: LiveKit refuses the key or the secret")
		require.Empty(t, c.Degraded())

		require.Len(t, after(errors.New("panic"), 0), 1)
		require.Contains(t, after(errors.New("away"), 0)[0], "cannot be reached")
	})
}

// Stop ends a look in progress, which then changes and logs nothing.
func TestStopOfACheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeLiveKit{hangs: true}
		c, logged := checking(t, f)
		synctest.Wait()
		began := time.Now()
		c.Stop()
		require.Zero(t, time.Since(began))
		c.Stop()
		require.Empty(t, c.Degraded())
		require.Empty(t, logged())
		require.Equal(t, 1, f.looks)
		NewCheck(CheckConfig{}, f).Stop()
	})
}
