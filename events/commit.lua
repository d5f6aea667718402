-- One commit: all of it or nothing.
--
-- Every check comes before the first write, and the first write is the append: a Lua error keeps the writes made
-- before it, so nothing after the append may be able to fail (SET and DEL cannot, RPUSH follows a DEL, and the
-- types of the other streams were looked at). Out of memory and lost replicas are refused at the first write.
--
-- KEYS: event stream, emergency brake, one a requirement, one a write, one a stream to acknowledge on
-- ARGV: expected seq, expected hash, until when it may grant permits (server time in us; 0: it grants none), counts of
--   requirements, entries, writes, acknowledgements, then
--   requirement: present (0|1)
--   entry:       id, number of strings, field, value …
--   write:       set|del|list, ttl in ms (0: none), number of values, value …
--   acknowledge: group, number of ids, id …
local argument = 0
local function take()
  argument = argument + 1
  return ARGV[argument]
end
local function take_some(count)
  local values = {}
  for i = 1, count do values[i] = take() end
  return values
end
local key = 0
local function take_key()
  key = key + 1
  return KEYS[key]
end
-- unpack fails on lists of some thousands.
local function call_with_many(values, ...)
  local command = {...}
  for i = 1, #values, 1000 do
    local part = {unpack(command)}
    for j = i, math.min(i + 999, #values) do part[#part + 1] = values[j] end
    redis.call(unpack(part))
  end
end

local events, halt = take_key(), take_key()
local expected_seq, expected_hash, grants = take(), take(), take()
local requirements, entries, writes, acknowledgements =
  tonumber(take()), tonumber(take()), tonumber(take()), tonumber(take())

local seq, hash = '0', string.rep('0', 64)
local last = redis.call('XREVRANGE', events, '+', '-', 'COUNT', 1)[1]
if last then
  for i = 1, #last[2], 2 do
    if last[2][i] == 'seq' then seq = last[2][i + 1] elseif last[2][i] == 'hash' then hash = last[2][i + 1] end
  end
end
if seq ~= expected_seq or hash ~= expected_hash then return {'CONFLICT', seq, hash} end

for i = 1, requirements do
  if redis.call('EXISTS', take_key()) ~= tonumber(take()) then return {'REQUIREMENT', tostring(i - 1), ''} end
end
if grants ~= '0' then
  -- A commit can lie in a frozen connection; a permit must not outlive the data it was decided on.
  local time = redis.call('TIME')
  if tonumber(time[1]) * 1000000 + tonumber(time[2]) > tonumber(grants) then return {'LATE', '', ''} end
  local brake = redis.call('TYPE', halt).ok
  if brake ~= 'none' then return {'HALTED', brake == 'string' and redis.call('GET', halt) or '', ''} end
end
for i = 1, acknowledgements do
  local kind = redis.call('TYPE', KEYS[2 + requirements + writes + i]).ok
  if kind ~= 'stream' and kind ~= 'none' then
    return redis.error_reply('WRONGTYPE ' .. KEYS[2 + requirements + writes + i] .. ' is a ' .. kind .. ', expected a stream')
  end
end

for _ = 1, entries do
  local id = take()
  redis.call('XADD', events, id, unpack(take_some(tonumber(take()))))
end
local gone = {'OK'}
for i = 1, writes do
  local name, op, ttl = take_key(), take(), tonumber(take())
  local values = take_some(tonumber(take()))
  if op == 'set' and ttl > 0 then
    redis.call('SET', name, values[1], 'PX', ttl)
  elseif op == 'set' then
    redis.call('SET', name, values[1])
  else
    if redis.call('DEL', name) == 0 and op == 'del' then gone[#gone + 1] = tostring(i - 1) end
    if op == 'list' and #values > 0 then
      call_with_many(values, 'RPUSH', name)
      if ttl > 0 then redis.call('PEXPIRE', name, ttl) end
    end
  end
end
for _ = 1, acknowledgements do
  local name, group = take_key(), take()
  call_with_many(take_some(tonumber(take())), 'XACK', name, group)
end
return gone
