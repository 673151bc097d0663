package main

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// reportInterval is how often a long wait is reported.
const reportInterval = 15 * time.Second

// screen prints one line at a time.
type screen struct {
	mu    sync.Mutex // guards start, and prints one line at a time
	start time.Time
	out   io.Writer
}

func newScreen(out io.Writer) *screen { return &screen{start: time.Now(), out: out} }

// restart sets the clock of the lines to 0.
func (s *screen) restart() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.start = time.Now()
}

func (s *screen) print(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _ = fmt.Fprintf(s.out, format, args...)
}

// say prints what is known about a participant, and when.
func (s *screen) say(who, format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _ = fmt.Fprintf(s.out, "%7.1fs  %-8s %s\n", time.Since(s.start).Seconds(), who, fmt.Sprintf(format, args...))
}

// during calls f. It says what the wait is for, and again as long as it lasts.
func (s *screen) during(what string, f func() error) error {
	start := time.Now()
	s.print("  %s\n", what)
	reports, done := time.NewTicker(reportInterval), make(chan error, 1)
	defer reports.Stop()
	go func() { done <- f() }()
	for {
		select {
		case err := <-done:
			return err
		case <-reports.C:
			s.print("  ... %.0f s\n", time.Since(start).Seconds())
		}
	}
}
