package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"
)

const (
	// connections is the default number of clients that refresh at the same time.
	connections = 64
	// manyConnections are so many clients that at any time some of them do not wait for a commit.
	manyConnections = 256
)

// load describes the answers of a server.
type load struct {
	perSecond float64
	latencies []time.Duration // sorted
}

// refresh makes keep-alives with the tokens in turn, for the given time. It fails if an answer is not 200. The rate is in requests per
// second; 0 means as many as possible. A latency counts from the moment when the request was due.
func refresh(ctx context.Context, address string, tokens []string, d time.Duration, rate float64) (load, error) {
	return refreshBy(ctx, connections, address, tokens, d, rate)
}

// refreshBy is refresh with the given number of clients.
func refreshBy(ctx context.Context, clients int, address string, tokens []string, d time.Duration, rate float64) (load, error) {
	var (
		wg     sync.WaitGroup
		mu     sync.Mutex // guards total and failed
		total  load
		failed error
		start  = time.Now()
	)
	for i := range clients {
		wg.Go(func() {
			c := client{address: address, tokens: tokens, next: i * len(tokens) / clients}
			if rate > 0 {
				c.interval = time.Duration(float64(clients) / rate * float64(time.Second))
				c.first = c.interval * time.Duration(i) / time.Duration(clients) // spreads the clients' first requests over the interval
			}
			err := c.run(ctx, start, d)
			mu.Lock()
			defer mu.Unlock()
			total.latencies = append(total.latencies, c.latencies...)
			if failed == nil {
				failed = err
			}
		})
	}
	wg.Wait()
	if failed != nil {
		return load{}, failed
	}
	total.perSecond = float64(len(total.latencies)) / time.Since(start).Seconds()
	slices.Sort(total.latencies)
	return total, nil
}

// client is one connection. It writes requests and reads answers itself, because an HTTP client would take more CPU time than the servers
// that are compared.
type client struct {
	address   string
	tokens    []string
	next      int
	latencies []time.Duration
	// interval is the time from one request to the next, and first the time until the first. An interval of 0 means as many as possible.
	interval, first time.Duration
}

func (c *client) run(ctx context.Context, start time.Time, d time.Duration) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", c.address)
	if err != nil {
		return err
	}
	defer conn.Close()
	answers := bufio.NewReader(conn)
	var request []byte
	for due := time.Now().Add(c.first); time.Since(start) < d && ctx.Err() == nil; due = due.Add(c.interval) {
		if c.interval > 0 {
			<-time.After(time.Until(due))
		} else {
			due = time.Now()
		}
		token := c.tokens[c.next%len(c.tokens)]
		c.next++
		request = fmt.Appendf(request[:0], "PUT /_matrix/client/v3/expiration/refresh HTTP/1.1\r\nHost: localhost\r\n"+
			"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n{\"expire_refresh_token\":\"%s\"}", 27+len(token), token)
		if _, err = conn.Write(request); err != nil {
			return err
		}
		if err = readAnswer(answers); err != nil {
			return err
		}
		c.latencies = append(c.latencies, time.Since(due))
	}
	return ctx.Err()
}

// readAnswer reads one answer, which must be 200.
func readAnswer(r *bufio.Reader) error {
	status, err := r.ReadSlice('\n')
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(status, []byte("HTTP/1.1 200")) {
		answer := string(status)
		rest, _ := r.Peek(r.Buffered())
		return fmt.Errorf("answered with %q and %q", answer, rest)
	}
	length := -1
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			break
		}
		if name, value, ok := bytes.Cut(line, []byte(": ")); ok && bytes.EqualFold(name, []byte("Content-Length")) {
			if length, err = strconv.Atoi(string(value)); err != nil {
				return err
			}
		}
	}
	if length < 0 {
		return errors.New("an answer without a length")
	}
	_, err = io.CopyN(io.Discard, r, int64(length))
	return err
}
