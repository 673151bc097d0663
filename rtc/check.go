package rtc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

const (
	// checkInterval is the time from one look at LiveKit to the next.
	checkInterval = time.Minute
	// checkTimeout is how long LiveKit may take to answer a look.
	checkTimeout = 5 * time.Second
	// maxSkew is how much two clocks may differ. LiveKit refuses tokens from a minute on (its leeway), and the clocks may drift apart further.
	maxSkew = 10 * time.Second
)

// Checker looks at LiveKit once.
type Checker interface {
	// Check returns how far LiveKit's clock is ahead of ours; zero if that is not known. It may be known together with an error. The error
	// livekit.ErrRefused means that LiveKit does not accept our key or secret. With all others it cannot be reached.
	Check(ctx context.Context) (skew time.Duration, err error)
}

// CheckConfig configures a Check.
type CheckConfig struct {
	// APIURL is where this server reaches LiveKit. It is only named in the log.
	APIURL string
	// Insecure are the URLs that browsers refuse to call from a page of a secure site, because they have no TLS.
	Insecure []string
}

// Check finds out whether LiveKit can be used: when the server starts, and every minute from then on. Each trouble is one line in the log when
// it begins, and is in Degraded as long as it lasts. The server runs all the same.
type Check struct {
	cfg     CheckConfig
	liveKit Checker
	stop    context.CancelFunc
	running sync.WaitGroup // the goroutine of Start

	mu       sync.Mutex // guards troubles; no other lock is taken while it is held
	troubles []trouble
}

// trouble is something that keeps calls from working.
type trouble struct {
	// name is what the health check shows, to everybody. The same trouble always has the same name.
	name string
	// line is what the log says: what is wrong now, and what to do about it.
	line string
}

// NewCheck returns a check that has not started. Until its first look nothing is known to be wrong, except for what the configuration says.
func NewCheck(cfg CheckConfig, liveKit Checker) *Check {
	return &Check{cfg: cfg, liveKit: liveKit, stop: func() {}}
}

// Start begins to look at LiveKit, and does not wait for it.
func (c *Check) Start(ctx context.Context) {
	ctx, c.stop = context.WithCancel(ctx)
	c.running.Go(func() {
		guard.KeepGoing(ctx, "checking LiveKit", func() { c.run(ctx) })
	})
}

// Stop ends the looks, and waits for one in progress. It may be called twice, and without Start.
func (c *Check) Stop() {
	c.stop()
	c.running.Wait()
}

func (c *Check) run(ctx context.Context) {
	next := time.NewTicker(checkInterval)
	defer next.Stop()
	for {
		if found := c.look(ctx); ctx.Err() == nil {
			c.note(found)
		}
		select {
		case <-ctx.Done():
			return
		case <-next.C:
		}
	}
}

// look returns what is wrong now.
func (c *Check) look(ctx context.Context) (found []trouble) {
	for _, url := range c.cfg.Insecure {
		found = append(found, trouble{"calls: clients cannot reach " + url + " from a secure page", fmt.Sprintf(
			"Browsers do not call %s from a secure page: clients need URLs with wss:// and https:// in matrix_rtc.livekit", url)})
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	skew, err := c.liveKit.Check(ctx)
	switch {
	case errors.Is(err, livekit.ErrRefused):
		found = append(found, trouble{"calls: LiveKit refuses the key or the secret",
			"LiveKit refuses our token: matrix_rtc.livekit must have a key of livekit.yaml, and the secret of that key"})
	case err != nil:
		found = append(found, trouble{"calls: LiveKit cannot be reached", fmt.Sprintf(
			"LiveKit cannot be reached at %s (matrix_rtc.livekit.api_url): %v. See whether it runs: systemctl status livekit", c.cfg.APIURL, err)})
	}
	if skew.Abs() > maxSkew {
		by := skew.Round(time.Second).String() + " ahead of"
		if skew < 0 {
			by = (-skew).Round(time.Second).String() + " behind"
		}
		found = append(found, trouble{"calls: LiveKit's clock is not the same as this server's", fmt.Sprintf(
			"LiveKit's clock is %s ours, and from a minute on it refuses our tokens: synchronise the clocks (timedatectl)", by)})
	}
	return found
}

// note logs what is new, and what is over.
func (c *Check) note(found []trouble) {
	c.mu.Lock()
	before := c.troubles
	c.troubles = found
	c.mu.Unlock()
	for _, t := range without(found, before) {
		logrus.Warn(t.line)
	}
	for _, t := range without(before, found) {
		logrus.Info("No longer: ", t.name)
	}
}

// without returns those troubles whose names are not among the others'.
func without(troubles, others []trouble) (rest []trouble) {
	for _, t := range troubles {
		if !slices.ContainsFunc(others, func(other trouble) bool { return other.name == t.name }) {
			rest = append(rest, t)
		}
	}
	return rest
}

// Degraded returns the names of all troubles, for the health check.
func (c *Check) Degraded() (names []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, t := range c.troubles {
		names = append(names, t.name)
	}
	return names
}
