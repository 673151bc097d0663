package config

import (
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/setup/config"
)

const (
	// maxPerUser is the greatest limit of anything per user. With a greater one, its product with a factor of the engine could overflow.
	// maxThreshold is the greatest number of requests at once. With more, a request would cost less than a nanosecond, which is the least
	// that a token bucket counts.
	maxPerUser   = 1_000_000
	maxThreshold = 1_000_000
	// maxMaxFinalised is less, because each event that is finalised makes the database step over as many rows of its sender
	// (limitFinalisedSQL).
	maxMaxFinalised = 10_000
	minKeep         = time.Minute
	maxMaxDuration  = 365 * 24 * time.Hour
	maxRestartGrace = time.Hour
	maxCooloffMS    = int64(time.Hour / time.Millisecond)
	// maxConnections and maxLifetime bound the numbers of the database. PostgreSQL itself allows at most 262,143 connections.
	maxConnections = 10_000
	maxLifetime    = int64(maxMaxDuration / time.Second)
)

// bounds says which values a key allows: from least to most, in multiples of step. Durations are in nanoseconds.
type bounds struct {
	key                      string
	value, least, most, step int64
	// shown and allowed are the value and the bounds as an error shows them.
	shown   any
	allowed string
}

func number[T int | int64](key string, value T, least, most int64) bounds {
	return bounds{key, int64(value), least, most, 1, value, fmt.Sprintf("from %d to %d", least, most)}
}

func duration(key string, value Duration, least, most, step time.Duration, allowed string) bounds {
	return bounds{key, int64(value), int64(least), int64(most), int64(step), value, allowed}
}

// bounds returns the bounds of every number and every duration. docs/configuration.md has the same table, and a test compares the two.
func (c *Config) bounds() []bounds {
	database, delayed, limits := &c.Database, &c.DelayedEvents, &c.RateLimiting
	return []bounds{
		number("database.max_open_conns", database.MaxOpenConnections, -1, maxConnections),
		number("database.max_idle_conns", database.MaxIdleConnections, -1, maxConnections),
		number("database.conn_max_lifetime", database.ConnMaxLifetimeSeconds, -1, maxLifetime),
		duration("max_duration", c.MaxDuration, time.Second, maxMaxDuration, time.Second, "whole seconds from 1s to 8760h"),
		number("max_running_per_user", c.MaxRunningPerUser, 1, maxPerUser),
		duration("delayed_events.max_delay", delayed.MaxDelay, time.Second, maxMaxDuration, time.Millisecond,
			"whole milliseconds from 1s to 8760h"),
		number("delayed_events.max_scheduled_per_user", delayed.MaxScheduledPerUser, 0, maxPerUser),
		number("delayed_events.max_scheduled_per_service_user", delayed.MaxScheduledPerServiceUser, 1, maxPerUser),
		duration("delayed_events.keep_finalised", delayed.KeepFinalised, minKeep, maxMaxDuration, 1, "from 1m to 8760h"),
		number("delayed_events.max_finalised_per_user", delayed.MaxFinalisedPerUser, 1, maxMaxFinalised),
		duration("restart_grace", c.RestartGrace, 0, maxRestartGrace, 1, "from 0s to 1h"),
		number("rate_limiting.token.threshold", limits.Token.Threshold, 1, maxThreshold),
		number("rate_limiting.token.cooloff_ms", limits.Token.CooloffMS, 1, maxCooloffMS),
		number("rate_limiting.unknown_token.threshold", limits.UnknownToken.Threshold, 1, maxThreshold),
		number("rate_limiting.unknown_token.cooloff_ms", limits.UnknownToken.CooloffMS, 1, maxCooloffMS),
		number("rate_limiting.user.threshold", limits.User.Threshold, 1, maxThreshold),
		number("rate_limiting.user.cooloff_ms", limits.User.CooloffMS, 1, maxCooloffMS),
		number("rate_limiting.due.threshold", limits.Due.Threshold, 1, maxThreshold),
		number("rate_limiting.due.cooloff_ms", limits.Due.CooloffMS, 1, maxCooloffMS),
	}
}

// Verify adds an error to configErrs for each value that is not allowed. The error names the key.
func (c *Config) Verify(configErrs *config.ConfigErrors) {
	for _, b := range c.bounds() {
		if b.value < b.least || b.value > b.most || b.value%b.step != 0 {
			configErrs.Add(fmt.Sprintf("invalid value for config key %q: %v (must be %s)", "expiration."+b.key, b.shown, b.allowed))
		}
	}
	c.MatrixRTC.verify(&c.DelayedEvents, configErrs)
}
